"""Reads the text of files that people attach to a message: PDF, and text in any usual encoding. Stores nothing.

Owns how much text comes of a file, the words for what is missing, and how many files are read at a time. A PDF is read
by a program of its own (`pdf.py`).
"""

from __future__ import annotations

import asyncio
import codecs
from typing import NamedTuple

import msgspec
import structlog

from llamalith_app.attachments.pdf import CPU_S, MAX_PAGES, WALL_S, File, Page
from llamalith_app.contracts.text import MAX_TEXT
from llamalith_app.errors import BadInput, ReaderBusy
from llamalith_app.supervise import program

MAX_CHARS = MAX_TEXT - 10_000
"""Characters of the text of one file. What is left of a prompt is for the person's own words."""
MAX_PROGRAMS = 2
TIMEOUT_S = 2 * WALL_S
"""For one PDF, the wait for a free process included."""

NO_TEXT = "The PDF has no text: its pages may be scanned, or pictures."
NO_PAGE = "None of the PDF's pages can be read."
TOO_HARD = "The PDF takes too much time or memory to read."
NOT_TEXT = "The file is neither text nor a PDF."
EMPTY = "The file is empty."

PDF_MAGIC = b"%PDF-"
CONTROLS = dict.fromkeys([*range(0x09), 0x0B, *range(0x0E, 0x20), *range(0x7F, 0xA0)])
"""No text has them. Without tab, line feed, form feed and carriage return."""
MAX_CONTROLS = 0.01
"""The share of them from which on a file is no text in an 8-bit encoding."""
BYTES_PER_CHAR = 4
"""At most, in UTF-8 and UTF-16."""

log = structlog.get_logger(__name__)


class Extract(NamedTuple):
    """The text of a file."""

    text: str
    """1 to MAX_CHARS characters, not all blank, with line ends as \\n."""
    pages: int | None
    """Of the whole file; None: it is a text file."""
    missing: str
    """What of the file is not in the text, as a sentence for people; empty: nothing."""


class AttachmentReader:
    """`timeout_s`: see TIMEOUT_S. `cpu_s`: seconds of processor time for one PDF."""

    def __init__(self, timeout_s: float = TIMEOUT_S, cpu_s: float = CPU_S) -> None:
        self._timeout_s = timeout_s
        self._arguments = (str(MAX_CHARS), str(cpu_s))
        self._programs = asyncio.Semaphore(MAX_PROGRAMS)

    async def read(self, name: str, data: bytes) -> Extract:
        """The text of this file. Its name says what it should be where the content does not.

        Raises BadInput for a file without text, and ReaderBusy if it could not be read in time.
        """
        if not data:
            raise BadInput(EMPTY)
        if data.startswith(PDF_MAGIC) or name.lower().endswith(".pdf"):
            return await self._read_pdf(data)
        return await asyncio.to_thread(_read_text, data)

    async def _read_pdf(self, data: bytes) -> Extract:
        try:
            async with asyncio.timeout(self._timeout_s), self._programs:
                result = await program.run("llamalith_app.attachments.pdf", data, *self._arguments)
        except TimeoutError:
            raise ReaderBusy("The PDF could not be read in time; try again.") from None
        except OSError as error:
            log.error("a PDF could not be read", reason=str(error))
            raise ReaderBusy("The PDF could not be read; try again.") from None
        if result.is_ended_from_outside or (result.returncode > 0 and b"MemoryError" not in result.stderr):
            # Its own limits did not end it, so the file is not the reason.
            log.error("a PDF could not be read", complaint=result.complaint)
            raise ReaderBusy("The PDF could not be read; try again.")
        return await asyncio.to_thread(_from_pages, result.stdout)


def _from_pages(stdout: bytes) -> Extract:
    """From what the program wrote, which may end anywhere. Raises BadInput."""
    lines = stdout[: stdout.rfind(b"\n") + 1].splitlines()
    if not lines:
        raise BadInput(TOO_HARD)
    file = msgspec.json.decode(lines[0], type=File)
    if file.problem:
        raise BadInput(file.problem)
    texts = [msgspec.json.decode(line, type=Page).text for line in lines[1:]]
    n_unreadable = texts.count(None)
    whole = _plain("\n\n".join(text.strip("\n") for text in texts if text))
    text = whole[:MAX_CHARS]
    if not text.strip():
        if len(texts) < min(file.pages, MAX_PAGES):
            raise BadInput(TOO_HARD)
        raise BadInput(NO_PAGE if n_unreadable else NO_TEXT)
    missing = []
    n_read, n_pages = len(texts), file.pages
    if len(whole) >= MAX_CHARS:
        missing.append(f"Only its beginning fits into a message: up to page {n_read:,} of {n_pages:,}.")
    elif n_read < n_pages:
        why = f"at most {MAX_PAGES:,} are read" if n_read == MAX_PAGES else "the others take too much time or memory"
        missing.append(f"Only the first {n_read:,} of its {n_pages:,} pages are here: {why}.")
    if n_unreadable:
        missing.append(f"{n_unreadable:,} of its {n_pages:,} pages cannot be read.")
    return Extract(text, n_pages, " ".join(missing))


def _read_text(data: bytes) -> Extract:
    """Raises BadInput for what is no text."""
    # One more, so that a longer file is noticed.
    beginning = data[: (MAX_CHARS + 1) * BYTES_PER_CHAR]
    text = _decode(beginning)
    if "\0" in text:
        raise BadInput(NOT_TEXT)
    plain = _plain(text)
    if len(text) - len(plain) - text.count("\r\n") > MAX_CONTROLS * len(text):
        raise BadInput(NOT_TEXT)
    if not plain.strip():
        raise BadInput(EMPTY)
    if len(plain) <= MAX_CHARS and len(beginning) == len(data):
        return Extract(plain, None, "")
    return Extract(plain[:MAX_CHARS], None, f"Only its first {MAX_CHARS:,} characters fit into a message.")


def _decode(data: bytes) -> str:
    """By its byte order mark, else as UTF-8, else as Windows-1252, which is Latin-1 with quotation marks. A character
    that the end cuts off is left out."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return codecs.getincrementaldecoder("utf-16")("replace").decode(data)
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(data)
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def _plain(text: str) -> str:
    """With line ends as \\n, without control characters."""
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(CONTROLS)
