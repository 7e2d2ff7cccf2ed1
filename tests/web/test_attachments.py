"""Files that are attached to a message: what comes of them as text, and what hostile ones cost."""

from __future__ import annotations

import asyncio
import html
import re
import signal
import time
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from llamalith_app.attachments.pdf import BROKEN, ENCRYPTED, MAX_PAGES
from llamalith_app.attachments.reader import EMPTY, MAX_CHARS, NO_PAGE, NO_TEXT, NOT_TEXT, TOO_HARD, AttachmentReader
from llamalith_app.contracts.text import MAX_TEXT
from llamalith_app.controllers.pages.attachments import block, shown_name
from llamalith_app.errors import BadInput, ReaderBusy
from llamalith_app.guards.forms import MAX_FILE_MB
from llamalith_app.settings.config import Config
from llamalith_app.supervise import program
from llamalith_app.web.request import MAX_BODY_BYTES
from tests.web import pdfs
from tests.web.conftest import log_in, module_config, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")
config = module_config

ROUTE = "/chat/attachments"
FOR_A_SCRIPT = {"Accept": "application/json"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser(config: Config) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(config) as client:
        await log_in(client)
        # On a busy machine a hostile file may take as long as it is allowed to.
        client.timeout = httpx.Timeout(120)
        yield client


async def send(browser: httpx.AsyncClient, name: str, data: bytes) -> httpx.Response:
    return await browser.post(ROUTE, files={"file": (name, data)}, headers=FOR_A_SCRIPT)


async def attached(browser: httpx.AsyncClient, name: str, data: bytes) -> dict[str, Any]:
    answer = await send(browser, name, data)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def refusal(browser: httpx.AsyncClient, name: str, data: bytes) -> str:
    answer = await send(browser, name, data)
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return str(answer.json()["detail"])


def hard_page(n: int) -> bytes:
    """The packed content of a page that draws nothing so many times: about 20 µs each."""
    return zlib.compress(b"BT /F1 11 Tf () Tj ET\n" * n)


async def test_the_text_of_a_pdf_comes_page_by_page(browser: httpx.AsyncClient) -> None:
    data = pdfs.text_pdf("Hello (world)\nsecond “line”", "page two: ä €")
    assert await attached(browser, "report.pdf", data) == {
        "name": "report.pdf",
        "text": "Hello (world)\nsecond “line”\n\npage two: ä €",
        "pages": 2,
        "truncated": False,
        "note": "",
    }
    # By its content, whatever it is called.
    assert (await attached(browser, "report", data))["pages"] == 2


async def test_both_columns_of_a_page_are_in_the_text(browser: httpx.AsyncClient) -> None:
    page = pdfs.drawn(["left one", "left two"]) + b"\n" + pdfs.drawn(["right one", "right two"], 320)
    text = (await attached(browser, "columns.pdf", pdfs.pages([page])))["text"]
    assert set(text.split()) == {"left", "right", "one", "two"}
    assert text.index("left one") < text.index("left two") < text.index("right two")


async def test_a_pdf_that_needs_a_password_says_so(browser: httpx.AsyncClient) -> None:
    data = pdfs.text_pdf("of nobody's business")
    assert await refusal(browser, "a.pdf", pdfs.encrypted(data, "secret")) == ENCRYPTED
    # Only what others may do with it is locked: everybody can open it.
    assert (await attached(browser, "a.pdf", pdfs.encrypted(data, "")))["text"] == "of nobody's business"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (pdfs.image_only, NO_TEXT),
        (lambda: pdfs.pages([]), NO_TEXT),
        (lambda: b"%PDF-1.7 and nothing more", BROKEN),
        (lambda: b"no PDF at all", BROKEN),
        (lambda: pdfs.text_pdf("cut off", "in the middle")[:700], BROKEN),
        (pdfs.looping_tree, BROKEN),
        (pdfs.only_loop, BROKEN),
        (pdfs.endless_form, NO_TEXT),
        pytest.param(pdfs.deep_bomb, NO_PAGE, marks=pytest.mark.slow),
        (lambda: b"", EMPTY),
    ],
    ids=[
        *("pictures", "no pages", "a head", "no pdf", "a half", "a loop", "nothing but a loop", "a form in itself"),
        *("a bomb of bombs", "nothing"),
    ],
)
async def test_a_pdf_without_text_or_sense_is_refused_with_the_reason(
    browser: httpx.AsyncClient, data: Callable[[], bytes], detail: str
) -> None:
    started = time.monotonic()
    assert await refusal(browser, "hostile.pdf", data()) == detail
    assert time.monotonic() - started < 60


@pytest.mark.slow
async def test_a_bomb_costs_its_own_page_alone(browser: httpx.AsyncClient) -> None:
    found = await attached(browser, "bomb.pdf", pdfs.zip_bomb(150_000_000))
    assert found["text"] == "before the bomb\n\nafter the bomb"
    assert found["truncated"] is True
    assert found["note"] == "1 of its 3 pages cannot be read."


@pytest.mark.slow
async def test_a_pdf_of_500_pages_is_read_to_its_end(browser: httpx.AsyncClient) -> None:
    found = await attached(browser, "long.pdf", pdfs.text_pdf(*(f"this is page {n}" for n in range(500))))
    assert found["text"].split("\n\n")[499] == "this is page 499"
    assert (found["pages"], found["truncated"]) == (500, False)


@pytest.mark.slow
async def test_the_text_is_never_more_than_a_message_holds(browser: httpx.AsyncClient) -> None:
    page = "\n".join(["word " * 100] * 40)
    found = await attached(browser, "book.pdf", pdfs.text_pdf(*[page] * 60))
    assert len(found["text"]) == MAX_CHARS < MAX_TEXT
    assert found["truncated"] is True
    assert re.fullmatch(r"Only its beginning fits into a message: up to page \d\d of 60\.", found["note"])
    found = await attached(browser, "book.txt", "ä".encode() * (MAX_CHARS + 1))
    assert found["text"] == "ä" * MAX_CHARS
    assert (found["pages"], found["truncated"]) == (None, True)
    assert found["note"] == f"Only its first {MAX_CHARS:,} characters fit into a message."
    assert (await attached(browser, "book.txt", b"a" * MAX_CHARS))["truncated"] is False


@pytest.mark.slow
async def test_of_too_many_pages_the_first_are_read(browser: httpx.AsyncClient) -> None:
    found = await attached(browser, "many.pdf", pdfs.text_pdf(*["x"] * (MAX_PAGES + 1)))
    assert found["note"] == "Only the first 2,000 of its 2,001 pages are here: at most 2,000 are read."


@pytest.mark.slow
async def test_what_takes_too_long_leaves_the_pages_before_it() -> None:
    first, slow = zlib.compress(pdfs.drawn(["the first"])), hard_page(100_000)
    data = pdfs.pages([first, *[slow] * 30], b"/Filter /FlateDecode")
    extract = await AttachmentReader(cpu_s=1).read("slow.pdf", data)
    assert extract.text == "the first"
    assert "the others take too much time or memory" in extract.missing
    with pytest.raises(BadInput, match=TOO_HARD):
        await AttachmentReader(cpu_s=1).read("slow.pdf", pdfs.pages([hard_page(200_000)], b"/Filter /FlateDecode"))


@pytest.mark.slow
async def test_a_file_of_16_mb_is_read_and_one_of_20_is_refused_politely(browser: httpx.AsyncClient) -> None:
    assert MAX_FILE_MB * 1_000_000 < MAX_BODY_BYTES
    data = pdfs.text_pdf("not so large a text")
    assert (await attached(browser, "a.pdf", pdfs.padded(data, 16_000_000)))["text"] == "not so large a text"
    for n_bytes, detail in (
        (16_400_000, "The file has 16.4 MB: at most 16 MB can be attached."),
        (20_000_000, "The file is too large: at most 16 MB can be attached."),
    ):
        answer = await send(browser, "a.pdf", pdfs.padded(data, n_bytes))
        assert (answer.status_code, answer.json()["detail"]) == (413, detail)

    # Without a length before it the body is refused as it comes.
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 1_000_000

    answer = await browser.post(
        ROUTE, content=chunks(), headers={"Content-Type": "multipart/form-data; boundary=b", **FOR_A_SCRIPT}
    )
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("naïve “quotes”: 你好 😀\n".encode(), "naïve “quotes”: 你好 😀\n"),
        ("\ufeffwith a mark\r\nand\rends".encode(), "with a mark\nand\nends"),
        ("日本語\r\n😀".encode("utf-16"), "日本語\n😀"),
        ("日本語\r\n😀".encode("utf-16-be").join([b"\xfe\xff", b""]), "日本語\n😀"),
        ("Grüße aus Köln".encode("latin-1"), "Grüße aus Köln"),
        ("“Grüße” für 5 €".encode("cp1252"), "“Grüße” für 5 €"),
        (b"a tab\tand a bell\a in " + b"x" * 200, "a tab\tand a bell in " + "x" * 200),
    ],
    ids=["utf-8", "utf-8 with a mark", "utf-16 le", "utf-16 be", "latin-1", "windows-1252", "a control character"],
)
async def test_text_is_read_in_any_usual_encoding(browser: httpx.AsyncClient, data: bytes, text: str) -> None:
    found = await attached(browser, "notes.txt", data)
    assert (found["text"], found["pages"], found["truncated"]) == (text, None, False)


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)), NOT_TEXT),
        (b"\x7fELF" + b"\x01\x02\x03" * 30 + b"\x80", NOT_TEXT),
        (b"a\0b", NOT_TEXT),
        (b" \n \r\n", EMPTY),
    ],
)
async def test_what_is_no_text_is_refused(browser: httpx.AsyncClient, data: bytes, detail: str) -> None:
    assert await refusal(browser, "notes.txt", data) == detail


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\report.pdf", "report.pdf"),
        ("a\u202efdp.exe", "a⟨U+202E⟩fdp.exe"),
        ("``` `x`\n# .md", "''' 'x'⟨U+000A⟩# .md"),
        ("<img src=x onerror=alert(1)>.md", "<img src=x onerror=alert(1)>.md"),
        ("n" * 5000 + ".txt", "n" * 200),
        ("folder/", "file"),
        (" ", "file"),
    ],
)
async def test_the_name_of_a_file_has_no_path_and_nothing_invisible(given: str, shown: str) -> None:
    assert shown_name(given) == shown


async def test_the_fence_around_a_file_is_longer_than_any_in_it() -> None:
    assert block("notes.md", "plain `code`\n") == "notes.md\n```md\nplain `code`\n```"
    assert block("notes", "```\nx\n`````") == "notes\n``````\n```\nx\n`````\n``````"
    assert block("report.pdf", "text") == "report.pdf\n```\ntext\n```"
    assert block("a.b c", "text") == "a.b c\n```\ntext\n```"


async def test_without_a_script_the_file_comes_back_in_the_form(browser: httpx.AsyncClient) -> None:
    typed = {"content": "Sum this up:\r\n<b>", "model": "smollm2", "temperature": "0.5", "once": "of-this-form"}
    answer = await browser.post(
        ROUTE, data=typed, files={"file": ("a`b.pdf", pdfs.text_pdf("a </textarea> ``` fence"))}
    )
    assert answer.status_code == 200
    assert "a&#39;b.pdf is in the message now. Nothing has been sent yet." in answer.text
    content = re.search(r'<textarea[^>]*name="content"[^>]*>\n(.*?)</textarea>', answer.text, re.DOTALL)
    assert content is not None
    assert html.unescape(content[1]) == "Sum this up:\n<b>\n\na'b.pdf\n````\na </textarea> ``` fence\n````"
    assert 'value="0.5"' in answer.text
    assert 'value="of-this-form"' in answer.text
    for files, status, why in (
        ({"file": ("a.pdf", pdfs.image_only())}, 400, NO_TEXT),
        ({"file": ("", b"")}, 400, "file: missing; choose one."),
    ):
        answer = await browser.post(ROUTE, data=typed, files=files)
        assert answer.status_code == status
        assert html.escape(why) in answer.text
        assert "Sum this up:\n&lt;b&gt;" in answer.text
    page = await browser.get("/chat/")
    assert 'formaction="/chat/attachments" formenctype="multipart/form-data" formnovalidate' in page.text


async def test_a_malformed_form_is_refused(browser: httpx.AsyncClient) -> None:
    async def post(content: bytes, content_type: str) -> httpx.Response:
        return await browser.post(ROUTE, content=content, headers={"Content-Type": content_type, **FOR_A_SCRIPT})

    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\ntext\r\n'
    assert (await post(part + b"--b--\r\n", "multipart/form-data; boundary=b")).json()["text"] == "text"
    for content, content_type in (
        (part, "multipart/form-data; boundary=b"),
        (part + b"--b--", "multipart/form-data"),
        (part + b"--b--", "multipart/form-data; boundary=other"),
        (part * 60 + b"--b--", "multipart/form-data; boundary=b"),
        (part.replace(b"a.txt", b"\xff.txt") + b"--b--", "multipart/form-data; boundary=b"),
        (part.replace(b"Content", b"C" * 9000) + b"--b--", "multipart/form-data; boundary=b"),
        (b"", "multipart/form-data; boundary=b"),
    ):
        answer = await post(content, content_type)
        assert answer.status_code == 400, content[:200]
        assert answer.json()["detail"].startswith("The form cannot be read")
    assert (await post(b"file=text", "application/x-www-form-urlencoded")).status_code == 415
    other = await browser.post(ROUTE, files={"another": ("a.txt", b"text")}, headers=FOR_A_SCRIPT)
    assert (other.status_code, other.json()["detail"]) == (400, "file: missing; choose one.")


async def test_only_the_pages_of_a_session_attach(browser: httpx.AsyncClient, config: Config) -> None:
    files = {"file": ("a.txt", b"text")}
    token = re.search(r'name="csrf_token" value="(\w+)"', (await browser.get("/chat/")).text)
    assert token is not None
    foreign = await browser.post(ROUTE, files=files, headers={"Origin": "http://evil.example", **FOR_A_SCRIPT})
    assert foreign.status_code == 403
    async with httpx.AsyncClient(base_url=browser.base_url, cookies=browser.cookies, trust_env=False) as silent:
        # It says nowhere where it comes from.
        assert (await silent.post(ROUTE, files=files, headers=FOR_A_SCRIPT)).status_code == 403
        sent = await silent.post(ROUTE, data={"csrf_token": token[1]}, files=files, headers=FOR_A_SCRIPT)
        assert sent.json()["text"] == "text"
        silent.cookies.clear()
        refused = await silent.post(ROUTE, files=files, headers=FOR_A_SCRIPT)
        assert refused.status_code == 401
        assert "Your session has ended" in refused.text


async def test_nothing_of_a_file_is_stored(browser: httpx.AsyncClient, config: Config) -> None:
    secret = "the-secret-of-this-file"
    await attached(browser, "a.pdf", pdfs.text_pdf(secret))
    await attached(browser, "a.txt", secret.encode())
    stored = [
        path for path in Path(config.data_dir).rglob("*") if path.is_file() and secret.encode() in path.read_bytes()
    ]
    assert stored == []


@pytest.mark.slow
async def test_a_pdf_holds_up_nobody_else(browser: httpx.AsyncClient) -> None:
    hard = pdfs.pages([hard_page(20_000)], b"/Filter /FlateDecode")
    reading = asyncio.create_task(send(browser, "a.pdf", hard))
    n_answered = 0
    while not reading.done():
        assert (await browser.get("/healthz")).status_code == 200
        n_answered += 1
    assert n_answered > 3
    assert (await reading).json()["detail"] == NO_TEXT


async def test_what_is_no_fault_of_the_file_is_said_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pdfs.text_pdf("text")
    with pytest.raises(ReaderBusy, match="in time"):
        await AttachmentReader(timeout_s=0).read("a.pdf", data)
    monkeypatch.setattr("llamalith_app.supervise.program.sys.executable", "/nowhere")
    with pytest.raises(ReaderBusy):
        await AttachmentReader().read("a.pdf", data)
    monkeypatch.undo()

    async def killed(module: str, text: bytes, *arguments: str) -> program.ProgramResult:
        return program.ProgramResult(b"", b"", -signal.SIGKILL)

    monkeypatch.setattr(program, "run", killed)
    with pytest.raises(ReaderBusy):
        await AttachmentReader().read("a.pdf", data)
