"""Files that a person attaches to a message, with and without JavaScript."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser, FilePayload, Page, Route, expect

from llamalith_app.settings.config import Config
from tests.browser.conftest import Watched, photograph, violations, window
from tests.web import pdfs
from tests.web.conftest import PASSWORD, make_config, serving

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path: Path, database_path: Path, redis_url: str) -> Config:
    return make_config(tmp_path, database_path, redis_url)


@pytest.fixture
async def origin(config: Config) -> AsyncIterator[str]:
    async with serving(config) as client:
        yield str(client.base_url).rstrip("/")


async def log_in(watched: Watched) -> Page:
    page = await watched.page("/chat/")
    await page.get_by_label("Password").fill(PASSWORD)
    await page.get_by_role("button", name="Log in").click()
    return page


def file(name: str, data: bytes) -> FilePayload:
    return {"name": name, "mimeType": "application/octet-stream", "buffer": data}


async def test_a_pdf_is_read_by_the_server_and_stands_in_the_message(origin: str, chromium: Browser) -> None:
    async with window(chromium, origin, viewport={"width": 360, "height": 800}) as browser:
        page = await log_in(browser)
        message, trouble = page.get_by_label("Message", exact=True), page.locator("#trouble")
        picker, attached = page.locator("[data-files]"), page.locator(".attached li")
        await message.fill("Sum this up:")

        # While the server reads it, nothing is sent; it can be left out again.
        held = asyncio.Event()

        async def hold(route: Route) -> None:
            await held.wait()
            await route.continue_()

        await page.route("**/chat/attachments", hold)
        await picker.set_input_files([file("left-out.pdf", pdfs.text_pdf("not this"))])
        await expect(page.get_by_role("progressbar", name="left-out.pdf is being read")).to_be_visible()
        assert await violations(page) == []
        await photograph(page, "attachment-is-read")
        await message.press("Enter")
        await expect(trouble).to_contain_text("Not sent yet: left-out.pdf is still being read.")
        await page.get_by_role("button", name="Do not attach left-out.pdf").click()
        await expect(attached).to_have_count(0)
        held.set()

        names = ["a\u202ereport`.pdf", "grüße.txt"]
        await picker.set_input_files(
            [
                file(names[0], pdfs.text_pdf("the first page", "```` and </textarea>")),
                file("scan.pdf", pdfs.image_only()),
                file("locked.pdf", pdfs.encrypted(pdfs.text_pdf("x"), "secret")),
                file("huge.pdf", pdfs.padded(pdfs.text_pdf("x"), 20_000_000)),
                file(names[1], "Grüße".encode("latin-1")),
            ]
        )
        await expect(attached).to_have_count(2)
        for problem in (
            "scan.pdf was not attached: The PDF has no text",
            "locked.pdf was not attached: The PDF is encrypted.",
            "huge.pdf was not attached: it has 20.0 MB, at most 16.0 MB can be.",
        ):
            await expect(trouble).to_contain_text(problem)
        await expect(attached.first).to_contain_text("a⟨U+202E⟩report'.pdf")
        assert await message.input_value() == "Sum this up:"
        await photograph(page, "attachments")
        await message.press("Enter")
        await expect(page.locator("#job-1 .you .text")).to_have_text(
            "Sum this up:\n\na⟨U+202E⟩report'.pdf\n`````\nthe first page\n\n```` and </textarea>\n`````"
            "\n\ngrüße.txt\n```txt\nGrüße\n```"
        )

        # A session that has ended loses nothing that was typed.
        await page.get_by_label("Message", exact=True).fill("typed before the session ended")
        await browser.context.clear_cookies()
        await page.locator("[data-files]").set_input_files([file("late.pdf", pdfs.text_pdf("late"))])
        await expect(page.locator("#trouble")).to_contain_text("Your session has ended.")
        await expect(page.get_by_label("Message", exact=True)).to_have_value("typed before the session ended")


async def test_without_javascript_a_button_puts_the_file_into_the_message(origin: str, chromium: Browser) -> None:
    async with window(chromium, origin, viewport={"width": 360, "height": 800}, java_script_enabled=False) as browser:
        page = await log_in(browser)
        message = page.get_by_label("Message", exact=True)
        await message.fill("Sum this up:")
        picker, report = page.get_by_label("File", exact=True), file("report.pdf", pdfs.text_pdf("all of it"))
        await picker.set_input_files([report])
        await photograph(page, "attachment-without-javascript")
        await page.get_by_role("button", name="Send").click()
        await expect(page.get_by_role("alert")).to_contain_text("report.pdf is not in the message yet")
        await picker.set_input_files([report])
        await page.get_by_role("button", name="Attach", exact=True).click()
        await expect(message).to_have_value("Sum this up:\n\nreport.pdf\n```\nall of it\n```")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#job-1 .you .text")).to_contain_text("all of it")
