"""What a person does with the product: the real model, behind the real nginx, in a real browser."""

from __future__ import annotations

import itertools
import re
from collections.abc import AsyncIterator, Sequence
from typing import Literal, NamedTuple

import httpx
import pytest
import pytest_asyncio
from playwright.async_api import Browser, FilePayload, Locator, Page, expect

from tests.browser.conftest import NARROW, WIDE, Watched, is_looked_at_by_axe, photograph, violations, window
from tests.nginx import nginx
from tests.product.conftest import Product, configure, running

pytestmark = pytest.mark.slow

SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
STORY = "Write a very long story about a dragon, with every detail of its life."


class Installation(NamedTuple):
    product: Product
    origin: str
    password: str


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_installation(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Installation]:
    folder = tmp_path_factory.mktemp("installation")
    (folder / "nginx").mkdir()
    # One story at a time.
    configure(folder, n_slots=1)
    # Read by `up` before it makes its own, whose password it prints once on standard output.
    async with running(folder, LLAMALITH_TRUSTED_PROXIES="127.0.0.1", LLAMALITH_AUTO_TITLES="false") as product:
        *_, password_line = [line for line in product.output if "admin password" in line]
        async with nginx(folder / "nginx", product.port) as origin:
            yield Installation(product, origin, password_line.split()[-1])


@pytest.fixture
async def installation(shared_installation: Installation) -> AsyncIterator[Installation]:
    """Shared by all tests, as a start takes seconds: what others have made is there. Nothing of theirs is open."""
    yield shared_installation
    answer = await shared_installation.product.api.post("/api/jobs/cancel?status=queued&status=processing")
    assert answer.status_code == 200, answer.text


async def log_in(window: Watched, password: str, path: str = "/chat/") -> Page:
    page = await window.page(path)
    await page.get_by_label("Password").fill(password)
    await page.get_by_role("button", name="Log in").click()
    return page


async def sent_job(page: Page) -> int:
    """The number of the job that the page has just led to."""
    address = re.compile(r"/chat/conversations/[^/]+#job-(\d+)$")
    await expect(page).to_have_url(address)
    found = address.search(page.url)
    assert found
    return int(found[1])


async def choose_length(page: Page, tokens: int) -> None:
    await page.get_by_role("button", name="Settings").click()
    await page.get_by_label("Longest reply").fill(str(tokens))
    await page.get_by_role("button", name="Close", exact=True).click()


async def test_a_person_logs_in_makes_a_job_replies_and_logs_out(installation: Installation, chromium: Browser) -> None:
    _, origin, password = installation
    async with window(chromium, origin, viewport={"width": 1280, "height": 800}) as browser:
        page = await log_in(browser, password, "/chat/jobs?status=done")
        await expect(page).to_have_url(f"{origin}/chat/jobs?status=done")
        await page.get_by_role("link", name="New chat").click()
        message = page.get_by_label("Message")
        await expect(message).to_be_focused()
        await message.fill("Say hello to the <b>dragon</b>.")
        await page.get_by_role("button", name="Settings").click()
        await page.get_by_label("System prompt").fill("You are brief and kind.")
        await expect(page.get_by_label("Temperature")).to_have_attribute("placeholder", "0.7")
        await page.get_by_label("Temperature").fill("0,2")
        await page.get_by_label("Longest reply").fill("60")
        await page.get_by_role("button", name="Close", exact=True).click()
        await page.get_by_role("button", name="Send").click()
        first = await sent_job(page)
        await expect(page).to_have_title("Say hello to the <b>dragon</b>. · Llamalith")
        await expect(message).to_be_focused()
        await expect(page.locator(f"#job-{first} .facts")).to_be_attached(timeout=60_000)
        await expect(page.locator(f"#job-{first} .said.model > .text")).not_to_be_empty()
        await expect(page.locator("#announcement")).to_have_text("The reply is there")
        address = page.url.partition("#")[0]
        await page.goto(address)
        await expect(page.get_by_label("Temperature")).to_have_value("0.2")
        await expect(page.get_by_label("System prompt")).to_have_value("You are brief and kind.")
        # A line break is Shift + Enter; Enter sends, and nothing is loaded anew.
        # Another version of the first message, and back to what was there.
        await page.locator(f"#job-{first}").hover()
        await page.get_by_role("button", name="Edit the prompt").click()
        await expect(message).to_have_value("Say hello to the <b>dragon</b>.")
        await message.fill("Say hello to the <i>knight</i>.")
        await page.keyboard.press("Enter")
        await expect(page.locator(f"#job-{first + 1} .facts")).to_be_attached(timeout=60_000)
        await expect(page.locator(f"#job-{first + 1} .versions")).to_contain_text("2/2")
        assert await violations(page) == []
        await page.get_by_role("button", name="Version before").click()
        await expect(page.locator(f"#job-{first} .versions")).to_contain_text("1/2")
        await expect(page.locator(".turns > li")).to_have_count(1)
        await page.wait_for_load_state()
        await page.evaluate("window.there = true")
        await message.fill("Say it again.")
        await page.keyboard.press("Shift+Enter")
        await page.keyboard.type("And again.")
        await page.keyboard.press("Enter")
        second = page.locator(f"#job-{first + 2}")
        await expect(second.locator(".you .text")).to_have_text("Say it again.\nAnd again.")
        await expect(message).to_have_value("")
        await expect(message).to_be_focused()
        typed = "typed while the reply is being written"
        await page.keyboard.type(typed)
        await expect(second.locator(".facts")).to_be_attached(timeout=60_000)
        await expect(second.locator(".said.model > .text")).not_to_be_empty()
        assert await message.input_value() == typed, "the reply came without a reload"
        assert await page.evaluate("window.there")
        await page.get_by_role("button", name="Attach files").click()
        files: list[FilePayload] = [
            {"name": "notes.md", "mimeType": "text/markdown", "buffer": b"# Notes\n```\ncode\n```\n"},
            {"name": "photo.png", "mimeType": "image/png", "buffer": b"\x89PNG\0\1\2"},
            {"name": "long.txt", "mimeType": "text/plain", "buffer": b"x" * 500_000},
        ]
        await page.locator("[data-files]").set_input_files(files)
        trouble = page.locator("#trouble")
        await expect(trouble).to_contain_text("photo.png was not attached: it is neither text nor a PDF.")
        await expect(trouble).to_contain_text("long.txt was not attached: it has 500 kB, at most 400 kB can be.")
        await expect(page.locator(".attached li")).to_have_count(1)
        await page.reload()
        await expect(page.locator(".attached li")).to_contain_text("notes.md")
        await photograph(page, "attached")
        await message.press("Enter")
        sent = page.locator(f"#job-{first + 3} .you .text")
        await expect(sent).to_have_text(f"{typed}\n\nnotes.md\n````md\n# Notes\n```\ncode\n```\n````")
        await expect(page.locator(".attached li")).to_have_count(0)
        await page.keyboard.press("Escape")
        await page.keyboard.press("?")
        await expect(page.get_by_role("dialog", name="Keyboard and notices")).to_be_visible()
        assert await violations(page) == []
        await page.get_by_label("Enter sends, Shift + Enter makes a new line").uncheck()
        await page.keyboard.press("Escape")
        await expect(page.locator("[data-hint=keys]")).to_have_text("Shift + Enter sends")
        await message.fill("one")
        await message.press("Enter")
        await expect(message).to_have_value("one\n")
        await message.fill("")
        await message.press("Escape")
        await page.keyboard.press("k")
        await expect(page.locator(".said:focus")).to_have_count(1)
        await page.keyboard.press("/")
        await expect(page.get_by_label("Search chats")).to_be_focused()
        await page.get_by_role("button", name="Log out").click()
        await expect(page).to_have_url(f"{origin}/chat/login")
        await page.go_back()
        await expect(page.get_by_role("heading", name="Log in")).to_be_visible()
        await expect(page.get_by_text("dragon")).to_have_count(0)


UNHURRIED = 1900
"""Tokens: long and slow enough for a person to change their mind."""


async def test_a_person_cancels_what_runs_and_what_waits(installation: Installation, chromium: Browser) -> None:
    _, origin, password = installation
    async with window(chromium, origin, viewport={"width": 1280, "height": 800}) as browser:
        page = await log_in(browser, password)
        await choose_length(page, UNHURRIED)
        turns: list[Locator] = []
        for number in range(3):
            # A script hears the keys.
            await expect(page.get_by_text("Enter sends", exact=True)).to_be_visible()
            await page.get_by_label("Message").fill(STORY)
            await page.keyboard.press("Enter")
            if not turns:
                # The first one leads to another page, where its turn is.
                first = await sent_job(page)
            turns.append(page.locator(f"#job-{first + number}"))
            await expect(turns[-1]).to_be_visible()
            await expect(page.get_by_label("Message")).to_have_value("")
        running, waiting, last = turns
        await expect(running.locator(".state").get_by_text("Writing")).to_be_visible(timeout=60_000)
        await expect(last.locator(".state")).to_contain_text("Waits for the reply before it")
        # Its words change all the time; the button under the pointer stays the same.
        button = running.get_by_role("button", name="Stop")
        await button.evaluate("(there) => { window.there = there }")
        before = await running.locator(".state").inner_text()
        await expect(running.locator(".state")).not_to_have_text(before)
        assert await button.evaluate("(there) => there === window.there")
        await photograph(page, "cancel-running")
        await page.get_by_label("Message").fill("typed meanwhile")
        await button.focus()
        await page.keyboard.press("Enter")
        await expect(running.get_by_text("Cancelled", exact=True)).to_be_visible()
        await expect(running).to_contain_text("Stopped. Until then this was written")
        await expect(running.locator(".unfinished")).not_to_be_empty()
        await expect(waiting.locator(".state").get_by_text("Writing")).to_be_visible(timeout=60_000)
        await expect(page.get_by_label("Message")).to_have_value("typed meanwhile")
        # What waits can be changed where it stands, and taken out.
        await last.hover()
        await last.get_by_role("button", name="Edit the prompt").click()
        message = page.get_by_label("Message")
        await expect(message).to_have_value(STORY)
        await page.get_by_role("button", name="Leave it as it is").click()
        await expect(message).to_have_value("typed meanwhile")
        await last.get_by_role("button", name="Edit the prompt").click()
        await message.fill("Something shorter.")
        await page.keyboard.press("Enter")
        await expect(last.locator(".you .text")).to_have_text("Something shorter.")
        await expect(message).to_have_value("")
        await last.get_by_role("button", name="Remove").click()
        await expect(last).to_have_count(0)
        # The first Escape leaves the field, the second one stops.
        await message.press("Escape")
        await page.keyboard.press("Escape")
        await expect(waiting.get_by_text("Cancelled", exact=True)).to_be_visible()
        await photograph_everywhere(browser, "cancelled", page.url.removeprefix(origin))


async def test_what_was_typed_is_there_again_after_a_way_back(installation: Installation, chromium: Browser) -> None:
    _, origin, password = installation
    async with window(chromium, origin) as browser:
        page = await log_in(browser, password)
        await expect(page).to_have_url(f"{origin}/chat/")
        # The script that keeps what is typed.
        await page.wait_for_load_state()
        message = page.get_by_label("Message")
        await message.fill("typed for ten minutes")
        await page.get_by_role("link", name="All chats").click()
        await expect(page).to_have_url(f"{origin}/chat/conversations")
        await page.go_back()
        await expect(message).to_have_value("typed for ten minutes")
        await page.reload()
        await expect(message).to_have_value("typed for ten minutes")
        await page.get_by_role("button", name="Send").click()
        await sent_job(page)
        await page.get_by_role("link", name="New chat").click()
        await expect(message).to_have_value("")


async def test_why_something_was_not_done_stays_to_be_read_and_what_was_done_is_shown(
    installation: Installation, chromium: Browser
) -> None:
    _, origin, password = installation
    async with window(chromium, origin) as browser:
        page = await log_in(browser, password)
        await page.get_by_label("Message").fill("word " * 20_000)
        await page.get_by_role("button", name="Send").click()
        number = await sent_job(page)
        first = page.locator(f"#job-{number}")
        await expect(first.get_by_text("Failed", exact=True)).to_be_visible(timeout=60_000)
        # What is too long now is too long the next time.
        await expect(first).to_contain_text("The same would fail again")
        await expect(first.get_by_role("button", name=f"Try job {number} again")).to_have_count(0)
        assert await page.evaluate("document.documentElement.scrollHeight") < 1600, "a long prompt is folded"
        await photograph(page, "folded")
        await first.get_by_text("Show all").click()
        assert await page.evaluate("document.documentElement.scrollHeight") > 5000
        # A script hears the keys.
        await expect(page.get_by_text("Enter sends", exact=True)).to_be_visible()
        await page.get_by_label("Message").fill(STORY)
        await page.keyboard.press("Enter")
        items = page.locator("#turns > li")
        await expect(items).to_have_count(2)
        # Not always the next number: a job that writes a title of another chat may have that.
        second = page.locator(f"#{await items.last.get_attribute('id')}")
        await second.get_by_role("button", name="Stop").click()
        await expect(second.get_by_text("Cancelled", exact=True)).to_be_visible()
        full = {"detail": "The queue is full: 1 job waits."}
        await page.route("**/retry", lambda route: route.fulfill(status=429, json=full))
        await second.get_by_role("button", name="again").click()
        trouble = page.locator("#trouble")
        await expect(trouble).to_contain_text("That was not done. The queue is full: 1 job waits.")
        async with page.expect_response("**/conversation/turns**"):
            pass
        await expect(trouble).to_be_visible()
        await page.unroute("**/retry")
        await second.get_by_role("button", name="again").click()
        # In the words of the page, or in those of the record, which comes a moment later.
        await expect(second.get_by_text("Tried again")).to_be_visible()
        await expect(trouble).to_be_hidden()
        await expect(items).to_have_count(3)


async def test_names_and_reasons_without_a_break_fit_a_narrow_window(
    installation: Installation, chromium: Browser
) -> None:
    _, origin, password = installation
    async with window(chromium, origin, viewport={"width": 360, "height": 800}) as browser:
        page = await log_in(browser, password)
        await page.goto(f"{origin}/chat/{'n' * 300}")
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360
        await page.goto(f"{origin}/chat/conversation?id={'c' * 200}")
        await page.goto(f"{origin}/chat/")
        await page.evaluate(
            "(id) => { document.querySelector('form.prompt [name=conversation_id]').value = id }", "c" * 200
        )
        await page.evaluate("document.querySelector('form.prompt [name=model] option').value = 'm'.repeat(180)")
        await page.get_by_label("Message").fill("x")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#trouble")).to_contain_text("Not sent.")
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360
        await page.evaluate("document.querySelector('form.prompt').submit()")
        await expect(page.get_by_role("heading", name="Not sent yet")).to_be_visible()
        await photograph(page, "not-sent-360")
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360


async def test_all_that_waits_is_cancelled_at_once_without_javascript(
    installation: Installation, chromium: Browser
) -> None:
    _, origin, password = installation
    async with window(chromium, origin, java_script_enabled=False) as browser:
        page = await log_in(browser, password)
        numbers: list[int] = []
        for _ in range(3):
            await page.goto(f"{origin}/chat/")
            await choose_length(page, UNHURRIED)
            await page.get_by_label("Message").fill(STORY)
            await page.get_by_role("button", name="Send").click()
            numbers.append(await sent_job(page))
        await page.goto(f"{origin}/chat/jobs?status=queued")
        await page.get_by_text("All jobs that match").click()
        await page.get_by_role("link", name="Cancel those that are open").click()
        await photograph(page, "cancel-all")
        await page.get_by_role("button", name="Cancel 2 jobs").click()
        await expect(page).to_have_url(f"{origin}/chat/jobs?status=queued&did=cancel&n=2")
        await expect(page.get_by_text("No job is queued just now.")).to_be_visible()
        await page.goto(f"{origin}/chat/jobs?status=processing")
        await page.get_by_role("button", name=f"Cancel job {numbers[0]}").click()
        await expect(page).to_have_url(f"{origin}/chat/jobs?status=processing#job-{numbers[0]}")
        await page.goto(f"{origin}/chat/jobs?status=cancelled")
        for number in numbers:
            await expect(page.locator(f"#job-{number} .badge.cancelled")).to_have_count(1)


async def photograph_everywhere(browser: Watched, name: str, path: str) -> None:
    """In light and dark, wide and narrow; and axe finds nothing."""
    page = await browser.page(path)
    for width, scheme in itertools.product((WIDE, NARROW), SCHEMES):
        await page.emulate_media(color_scheme=scheme)
        await page.set_viewport_size({"width": width, "height": 800})
        if is_looked_at_by_axe(width, scheme):
            assert await violations(page) == []
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        await photograph(page, f"{name}-{scheme}-{width}")
    await page.close()


async def test_everything_is_done_by_the_keyboard_alone(installation: Installation, chromium: Browser) -> None:
    _, origin, password = installation
    async with window(chromium, origin) as browser:
        page = await browser.page("/chat/")
        # A browser gives a field its focus when it first draws the page.
        await expect(page.get_by_label("Password")).to_be_focused()
        await page.keyboard.type(password)
        await page.keyboard.press("Enter")
        await expect(page).to_have_url(f"{origin}/chat/")
        # Before that no script hears the keys, and with it Chromium goes to the fragment, and its focus, once more.
        await page.wait_for_load_state()
        message = page.get_by_label("Message")
        await expect(message).to_be_focused()
        outline = "(field) => { const { outlineWidth, outlineStyle } = getComputedStyle(field.form ?? field)"
        outline += "; return `${outlineWidth} ${outlineStyle}` }"
        assert await message.evaluate(outline) == "2px solid"
        await page.keyboard.type("Say hi.")
        await page.keyboard.press("Control+Enter")
        number = await sent_job(page)
        await expect(page.locator(f"#job-{number} .facts")).to_be_attached(timeout=60_000)
        await page.keyboard.press("Escape")
        await page.keyboard.press("n")
        await expect(page).to_have_url(f"{origin}/chat/")
        await page.goto(f"{origin}/chat/jobs")
        skip = page.get_by_role("link", name="Skip to the content")
        await page.keyboard.press("Tab")
        await expect(skip).to_be_focused()
        assert await skip.evaluate(outline) == "3px solid"
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("main")).to_be_focused()


async def test_the_forms_work_without_javascript(installation: Installation, chromium: Browser) -> None:
    product, origin, password = installation
    async with window(chromium, origin, java_script_enabled=False) as browser:
        page = await log_in(browser, password)
        await page.get_by_label("Message").fill("Say hello.")
        await page.get_by_role("button", name="Send").click()
        first = await sent_job(page)
        assert (await product.ended(first))["status"] == "done"
        await page.get_by_role("link", name="Refresh").click()
        await expect(page.locator(f"#job-{first} .said.model > .text")).not_to_be_empty()
        await page.get_by_role("button", name="Dark").click()
        await expect(page.locator("html")).to_have_attribute("data-theme", "dark")
        await page.get_by_role("button", name="Settings").click()
        await page.get_by_label("Longest reply").fill("40")
        await page.get_by_role("button", name="Close", exact=True).click()
        await page.get_by_label("Message").fill("Again.")
        await page.get_by_role("button", name="Send").click()
        assert (await product.ended(first + 1))["status"] == "done"
        await page.get_by_role("link", name="Refresh").click()
        await expect(page.locator(f"#job-{first + 1} .facts")).to_be_attached()
        await page.get_by_role("button", name="Log out").click()
        await expect(page).to_have_url(f"{origin}/chat/login")


async def test_the_monitor_shows_the_running_task_and_its_progress_and_changes_nothing(
    installation: Installation, chromium: Browser
) -> None:
    product, origin, password = installation
    async with window(chromium, origin, viewport={"width": 1280, "height": 800}) as browser:
        page = await log_in(browser, password, "/chat/queue")
        await expect(page).to_have_url(f"{origin}/chat/queue/")
        await expect(page.get_by_role("heading", name="Queues")).to_be_visible()
        # More than any machine has written before the page was looked at.
        jobs = [await product.submit(STORY, parameters={"max_tokens": UNHURRIED}) for _ in range(8)]
        await product.in_phase(jobs[0], "decode")
        await page.get_by_role("link", name="llamalith:smollm2").click()
        await page.get_by_role("row").filter(has=page.get_by_text("active", exact=True)).get_by_role("link").click()
        # A task reports its progress to SAQ every 5 s; one task goes on as long as there is work.
        bar = page.locator("progress")
        await expect(bar).not_to_have_js_property("value", 0, timeout=60_000)
        await expect(page.get_by_text("active")).to_be_visible()
        assert await violations(page) == []
        await photograph(page, "monitor-task")
        await expect(page.get_by_role("button", name="Retry")).to_have_count(0)
        await page.reload()
        await expect(page.get_by_role("heading", name="Job")).to_be_visible()
        status = await page.evaluate("fetch(location.href, {method: 'POST'}).then((answer) => answer.status)")
        assert status == 405


async def test_nginx_hands_on_the_api_under_the_pages_prefix(installation: Installation) -> None:
    product, origin, _ = installation
    async with httpx.AsyncClient(base_url=origin, headers=product.api.headers, trust_env=False) as client:
        assert (await client.get("/chat")).headers["location"] == "/chat/"
        accepted = await client.post("/chat/api/jobs", json={"content": "Say hi.", "conversation_id": "a/b"})
        assert accepted.status_code == 200
        job_id = accepted.json()["job_id"]
        assert (await product.ended(job_id))["status"] == "done"
        assert (await client.get(f"/chat/api/jobs/{job_id}")).json()["conversation_id"] == "a/b"
        too_big = await client.post("/chat/api/jobs", content=b"x" * (16 * 1024 * 1024 + 1))
        assert too_big.status_code == 413
        assert (await client.get("/api/jobs")).status_code == 404, "only /chat/ is served"


OPEN_EACH_KIND = """() => {
    const seen = new Set()
    const kind = (one) => one ? `${kind(one.parentElement)} ${one.localName}.${one.className}` : ""
    for (const one of document.querySelectorAll("details")) one.open = false
    for (const one of [...document.querySelectorAll("details")].reverse()) {
        const kinds = [...one.querySelectorAll("*")].map(kind)
        one.open = kinds.some((each) => !seen.has(each)) || one.querySelector("details[open]") !== null
        for (const each of kinds) seen.add(each)
    }
}"""
"""Opens so many parts that each kind of element is seen once. A colour, which axe takes seconds for in the whole
reference, belongs to a kind."""


async def test_axe_finds_nothing_wrong_on_any_page_and_each_is_photographed(
    installation: Installation, chromium: Browser
) -> None:
    product, origin, password = installation
    story = "Tell me in three sentences how a small dragon learned to share its treasure."
    await product.ended(
        await product.submit(story, conversation_id="dragon", system_prompt="You are a patient storyteller.")
    )
    await product.ended(await product.submit("And what did its friends say?", conversation_id="dragon"))
    await product.ended(await product.submit("word " * 20_000, conversation_id="too long"))
    async with window(chromium, origin, viewport={"width": WIDE, "height": 800}) as browser:
        page = await browser.page("/chat/")

        async def check(name: str, widths: Sequence[int] = (NARROW, WIDE)) -> None:
            for width, scheme in itertools.product(widths, SCHEMES):
                await page.set_viewport_size({"width": width, "height": 800})
                await page.emulate_media(color_scheme=scheme)
                if len(widths) == 1 or is_looked_at_by_axe(width, scheme):
                    assert await violations(page) == [], (name, width, scheme)
                wider = await page.evaluate(
                    "document.documentElement.scrollWidth - document.documentElement.clientWidth"
                )
                assert wider <= 0, f"{name} scrolls sideways by {wider} px at {width}"
                await photograph(page, f"{name}-{scheme}-{width}")
            await page.set_viewport_size({"width": WIDE, "height": 800})

        await check("login")
        await page.get_by_label("Password").fill("wrong")
        await page.get_by_role("button", name="Log in").click()
        await expect(page.get_by_text("Wrong password.")).to_be_visible()
        await check("login-wrong")
        await page.get_by_label("Password").fill(password)
        await page.get_by_role("button", name="Log in").click()
        await expect(page).to_have_url(f"{origin}/chat/")
        await page.goto(f"{origin}/chat/queue/queues/llamalith:smollm2")
        await expect(page.get_by_role("heading", name="Workers")).to_be_visible()
        await check("monitor-idle")
        await product.submit("Write a long story about the sea.", conversation_id="dragon")
        await product.submit("And one about the wind.", conversation_id="dragon")
        for name, path in (
            ("new-chat", "/chat/"),
            ("conversations", "/chat/conversations"),
            ("conversation", "/chat/conversations/dragon"),
            ("too-long", "/chat/conversations/too%20long"),
            ("not-found", "/chat/nothing"),
        ):
            await page.goto(origin + path)
            await check(name)
        for name, path, heading in (
            ("monitor", "/chat/queue/", "Queues"),
            ("monitor-queue", "/chat/queue/queues/llamalith:smollm2", "Workers"),
        ):
            await page.goto(origin + path)
            await expect(page.get_by_role("heading", name=heading)).to_be_visible()
            await check(name)
        await page.goto(origin + "/chat/docs")
        await page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
        assert await violations(page, but="color-contrast") == []
        await page.evaluate(OPEN_EACH_KIND)
        await check("api-open", [NARROW])
        await page.goto(origin + "/chat/")
        await page.get_by_label("Message").fill("   ")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#trouble")).to_have_text("Not sent. The message is empty: type one. Close")
        await check("refused")
        await page.evaluate("document.querySelector('form.prompt').submit()")
        await expect(page.get_by_role("heading", name="Not sent yet")).to_be_visible()
        await check("not-sent")
        await page.get_by_role("button", name="Settings").click()
        await check("settings")
        await page.keyboard.press("Escape")
        await page.get_by_role("button", name="Hide the sidebar").click()
        await check("without-sidebar", [WIDE])
        await page.get_by_role("button", name="Show the sidebar").click()
        await page.set_viewport_size({"width": NARROW, "height": 800})
        await page.get_by_role("button", name="Open the sidebar").click()
        await check("drawer", [NARROW])
        await page.goto(origin + "/chat/")
        await page.goto(origin + "/chat/offline")
        await check("offline")
        await page.goto(origin + "/chat/logout", referer="https://elsewhere.example/")
        await expect(page.get_by_role("heading", name="Log out?")).to_be_visible()
        await check("logout-asked")
        await page.goto(origin + "/chat/")
        await browser.context.clear_cookies()
        await page.get_by_label("Message").fill("Typed before the session ended.")
        await page.get_by_role("button", name="Send").click()
        await expect(page.get_by_text("Typed before the session ended.")).to_be_visible()
        await check("login-with-draft")
