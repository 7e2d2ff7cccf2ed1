"""Extracts the text of a PDF.

`python -m llamalith_app.attachments.pdf` is a program that `reader.py` starts, because a PDF can be malicious: it reads
the file from standard input and writes a line of JSON for the file and one for each page to standard output, as it gets
on. What ends it early leaves the pages before.
"""

from __future__ import annotations

import io
import logging
import signal
import sys
from collections.abc import Iterator

import msgspec
from pypdf import PdfReader
from pypdf.errors import DependencyError, FileNotDecryptedError

from llamalith_app.supervise.limits import limit

CPU_S = 10.0
"""Seconds of processor time for one file."""
WALL_S = 30.0
"""Seconds for one file on a machine that is busy otherwise."""
ADDRESS_SPACE_BYTES = 512 * 1024 * 1024
MAX_PAGES = 2000

BROKEN = "This is no PDF, or it is broken."
ENCRYPTED = "The PDF is encrypted. Save a copy of it without password and permissions, and attach that."


class File(msgspec.Struct):
    """The first line."""

    pages: int = 0
    problem: str = ""
    """Why it cannot be read; empty: the pages follow."""


class Page(msgspec.Struct):
    """Each further line."""

    text: str | None
    """None: this page cannot be read."""


def extract(data: bytes, max_chars: int) -> Iterator[File | Page]:
    """The file, then its first MAX_PAGES pages, up to the one with which they have `max_chars` characters together."""
    try:
        reader = PdfReader(io.BytesIO(data))
        pages = reader.pages
        n_pages = len(pages)
        if reader.is_encrypted:
            pages[0].extract_text()
    except (DependencyError, FileNotDecryptedError):
        yield File(problem=ENCRYPTED)
        return
    except Exception:  # noqa: BLE001 - on malicious files it raises whatever its code happens to raise
        yield File(problem=BROKEN)
        return
    yield File(n_pages)
    n_chars = 0
    for number in range(min(n_pages, MAX_PAGES)):
        try:
            text = pages[number].extract_text()
        except Exception:  # noqa: BLE001 - the same
            yield Page(None)
        else:
            # Surrogates that stand alone cannot be encoded.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")[:max_chars]
            yield Page(text)
            n_chars += len(text)
            if n_chars >= max_chars:
                return


def main() -> None:
    """The program: limits itself, then reads one file. Its arguments are the number of characters that are wanted, and
    the seconds of processor time."""
    max_chars, cpu_s = sys.argv[1:]
    limit(float(cpu_s), ADDRESS_SPACE_BYTES)
    signal.setitimer(signal.ITIMER_REAL, WALL_S)
    # It warns of each flaw, and a file may have millions.
    logging.disable()
    for line in extract(sys.stdin.buffer.read(), int(max_chars)):
        sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
