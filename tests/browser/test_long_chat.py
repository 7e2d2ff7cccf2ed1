"""A chat of many turns: it opens at its end, and what was said before comes as its reader scrolls up."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, expect
from sqlalchemy import Connection

from llamalith_app.controllers.pages.conversation import TURNS_ON_PAGE
from llamalith_app.settings.config import Config
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import submission, transitions
from tests.browser.conftest import SCREENSHOTS
from tests.browser.test_hostile import at_home
from tests.store.samples import NOW, finish, prompt, register_worker
from tests.web.conftest import make_config, serving

N_TURNS = 2 * TURNS_ON_PAGE + 5
REPLY = "A paragraph that takes more than a line of any window. " * 6
CODE = "```python\n" + "print('a line')\n" * 30 + "```\n\n"
AT = "(item) => item.getBoundingClientRect().top"


@pytest.fixture
def config(tmp_path: Path, database_path: Path, redis_url: str) -> Config:
    return make_config(tmp_path, database_path, redis_url)


def fill(connection: Connection) -> None:
    worker = register_worker(connection)
    for number in range(N_TURNS):
        submission.submit(connection, prompt(f"prompt {number}"), NOW)
        claimed = transitions.claim(connection, "m", 1, worker, NOW)
        assert claimed is not None
        finish(connection, claimed, f"{REPLY}\n\n{CODE * (number % 3)}The end of {number}.")


async def scroll_to_the_beginning(page: Page) -> None:
    """With the wheel, so far that the page begins near by."""
    await page.mouse.move(640, 300)
    await page.evaluate("document.documentElement.scrollTop = 2500")
    await page.mouse.wheel(0, -1200)


async def photograph_window(page: Page, name: str) -> None:
    """What is seen of it: the rest is not drawn."""
    SCREENSHOTS.mkdir(exist_ok=True)
    await page.screenshot(path=SCREENSHOTS / f"{name}.png")


@pytest.mark.slow
async def test_what_was_said_before_comes_as_its_reader_scrolls_up_and_moves_nothing(
    config: Config, database: Database, chromium: Browser
) -> None:
    await database.write(fill)
    async with (
        serving(config) as client,
        at_home(client, chromium, viewport={"width": 1280, "height": 800}) as browser,
    ):
        page = await browser.page("/chat/conversations/c")
        items = page.locator(".turns > li")
        await expect(page.get_by_text(f"The end of {N_TURNS - 1}.")).to_be_in_viewport()
        await expect(items).to_have_count(TURNS_ON_PAGE)
        await page.get_by_label("Message").fill("typed meanwhile")
        # A menu sticks out of its turn.
        middle = items.nth(TURNS_ON_PAGE - 4)
        await middle.scroll_into_view_if_needed()
        await middle.hover()
        await middle.get_by_label("More").click()
        menu = middle.locator(".pops > div")
        assert await menu.evaluate(
            """(menu) => {
              const { left, top, width } = menu.getBoundingClientRect()
              return menu.contains(document.elementFromPoint(left + width / 2, top + 8))
            }"""
        )
        await page.keyboard.press("Escape")
        # What is read stays where it is, to the pixel, while the turns above it come.
        await page.evaluate(
            """() => {
              window.tops = []
              const list = document.querySelector('.turns')
              const first = list.firstElementChild
              const put = list.prepend.bind(list)
              list.prepend = (...items) => {
                const before = first.getBoundingClientRect().top
                put(...items)
                requestAnimationFrame(() => window.tops.push(before, first.getBoundingClientRect().top))
              }
            }"""
        )
        await scroll_to_the_beginning(page)
        await expect(items).to_have_count(2 * TURNS_ON_PAGE)
        await page.wait_for_function("() => window.tops.length === 2")
        before, after = await page.evaluate("window.tops")
        assert abs(before - after) < 1
        await expect(page.locator(".to-end:not([data-is-new])")).to_be_visible()
        brought = page.locator(f"#job-{N_TURNS - TURNS_ON_PAGE}")
        await brought.scroll_into_view_if_needed()
        await expect(brought.locator("figure.code .copy").first).to_have_text("Copy")
        await photograph_window(page, "long-1280")
        # An edit of it goes into the form of this page.
        await brought.hover()
        await brought.get_by_role("button", name="Edit the prompt").click()
        await expect(page.get_by_label("Message")).to_have_value(f"prompt {N_TURNS - TURNS_ON_PAGE - 1}")
        await page.get_by_role("button", name="Leave it as it is").click()
        await expect(page.get_by_label("Message")).to_have_value("typed meanwhile")
        # Who is on the link itself is not moved away from it, and gets the turns by Enter.
        link = page.get_by_role("link", name="Earlier messages (5 turns)")
        await link.focus()
        await page.evaluate("document.documentElement.scrollTop = 0")
        await expect(link).to_be_in_viewport()
        await page.keyboard.press("Enter")
        await expect(items).to_have_count(N_TURNS)
        await expect(page.locator(f"#job-{N_TURNS - 2 * TURNS_ON_PAGE} .said.model")).to_be_focused()
        await expect(page.locator(".earlier")).to_be_hidden()
        await page.keyboard.press("k")
        await expect(page.locator(f"#job-{N_TURNS - 2 * TURNS_ON_PAGE} .said.you")).to_be_focused()
        await page.set_viewport_size({"width": 360, "height": 800})
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        await photograph_window(page, "long-360")
        # A page that is loaded anew goes back to where its reader was; one whose address names a turn goes there.
        near = page.locator("#job-3")
        await near.scroll_into_view_if_needed()
        await page.wait_for_function("() => history.state?.place?.turn <= 2")
        await page.mouse.move(180, 300)
        await page.mouse.wheel(0, -20)
        await page.wait_for_function(
            """() => {
              const { turn, top } = history.state.place
              const at = document.querySelector(`[data-turn="${turn}"]`).getBoundingClientRect().top
              return Math.abs(at - top) < 1
            }"""
        )
        await page.reload()
        await expect(items).to_have_count(N_TURNS)
        await expect(near).to_be_in_viewport()
        await page.goto(f"{browser.base}/chat/conversations/c#job-{N_TURNS - 9}")
        await expect(page.locator(f"#job-{N_TURNS - 9} .you")).to_be_in_viewport()
        # A turn that cannot be brought is a page away.
        await page.route("**/turns?*before=*", lambda route: route.abort())
        await page.goto(f"{browser.base}/chat/conversations/c")
        link = page.get_by_role("link", name="Earlier messages")
        await link.focus()
        await page.keyboard.press("Enter")
        address = f"{browser.base}/chat/conversations/c?before={TURNS_ON_PAGE + 5}&last={TURNS_ON_PAGE + 5}"
        await expect(page).to_have_url(address)
