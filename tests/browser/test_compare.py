"""Answers of several models beside each other, as a person asks for them, reads them and goes on with one."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from playwright.async_api import Browser, Locator, Page, expect

from llamalith_app.settings.config import Config, ModelConfig
from tests.browser.conftest import NARROW, WIDE, photograph, violations
from tests.browser.test_hostile import at_home
from tests.web.conftest import make_config, serving
from tests.worker.conftest import Script, working_in_process

THIRD = "third-model-with-a-long-name"
LONG_LINE = "x = " + " + ".join(f"some_long_name_{n}" for n in range(40))
ANSWER = f"Here it is:\n\n```python\n{LONG_LINE}\n```\n\n" + "It was warm on the hill above the village. " * 9
HALF = 60


@pytest.fixture
def config(tmp_path: Path, database_path: Path, redis_url: str) -> Config:
    config = make_config(tmp_path, database_path, redis_url)
    return msgspec.structs.replace(
        config, models=(*config.models, ModelConfig(name=THIRD, path=tmp_path / "absent.gguf"))
    )


def column(page: Page, job_id: int) -> Locator:
    return page.locator(f"#turns > #job-{job_id}.side")


async def fits(page: Page) -> bool:
    width = page.viewport_size["width"] if page.viewport_size else 0
    fits = True
    for one in (NARROW, WIDE):
        await page.set_viewport_size({"width": one, "height": 800})
        fits &= await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    await page.set_viewport_size({"width": width, "height": 800})
    return fits


@pytest.mark.slow
async def test_a_person_asks_three_models_at_once_and_goes_on_with_one(
    config: Config, chromium: Browser, tmp_path: Path
) -> None:
    gate, later = tmp_path / "gate", tmp_path / "later"
    script = Script(tmp_path / "script.json")
    script.write(
        {"when": "later", "reply": "Not at once.", "after": 4, "gate": str(later)},
        {"when": "story", "reply": ANSWER, "after": HALF, "gate": str(gate)},
        {"when": "", "reply": "Short."},
    )
    async with (
        serving(config) as api,
        working_in_process(config, script),
        at_home(api, chromium, viewport={"width": WIDE, "height": 800}) as browser,
    ):
        page = await browser.page("/chat/")
        await page.get_by_label("Message").fill("Tell me a story.")
        # By keyboard: the menu, a model, another one; the one that is chosen is not among them.
        await page.get_by_label("Compare with other models").focus()
        await page.keyboard.press("Enter")
        await expect(page.locator(".compare label:visible")).to_have_count(2)
        for _ in range(2):
            await page.keyboard.press("Tab")
            await page.keyboard.press("Space")
        assert await violations(page) == []
        assert await fits(page)
        await photograph(page, "compare-menu")
        await page.keyboard.press("Escape")
        await expect(page.locator(".compare summary")).to_be_focused()
        await page.get_by_role("button", name="Send").dblclick()
        first, second, third = (column(page, n) for n in (1, 2, 3))
        await expect(first.locator("[data-told=delta] code")).to_contain_text("some_long", timeout=20_000)
        await expect(page.locator("#turns > li")).to_have_count(4)
        await expect(second.locator(".state")).to_contain_text("Waits for the reply before it")
        await expect(page.locator(".bubble")).to_have_count(1)
        assert await page.locator(".side .name").all_inner_texts() == ["smollm2", "other", THIRD]
        # Each has its own Stop, and the next one begins in its own column.
        await first.get_by_role("button", name="Stop").click()
        await expect(second.locator("[data-told=delta] code")).to_contain_text("some_long", timeout=20_000)
        await expect(first.locator(".unfinished")).to_contain_text("Here it is:")
        await expect(first.get_by_text("The chat goes on from here")).to_be_visible()
        tops = [await one.evaluate("(one) => Math.round(one.getBoundingClientRect().top)") for one in (first, second)]
        assert tops[0] == tops[1], "beside each other"
        assert await violations(page) == []
        assert await fits(page)
        await second.get_by_role("button", name="Go on with the answer of other").click()
        await expect(second.get_by_text("The chat goes on from here")).to_be_visible()
        await expect(second.locator("[data-told=delta] code")).to_contain_text("some_long", timeout=20_000)
        await expect(page.get_by_label("Model", exact=True)).to_have_value("other")
        await page.evaluate("window.isTheSame = true")
        gate.touch()
        await expect(third).to_have_attribute("data-status", "done", timeout=20_000)
        await expect(second.locator("> .said > .markdown code")).to_have_text(LONG_LINE)
        await expect(page.locator("#announcement")).to_contain_text(f"{THIRD}: The reply is there")
        await photograph(page, f"compare-{WIDE}-light")
        await page.emulate_media(color_scheme="dark")
        assert await violations(page) == []
        await photograph(page, f"compare-{WIDE}-dark")
        assert await fits(page)
        await page.get_by_label("Message").fill("And later?")
        await page.keyboard.press("Enter")
        alone = page.locator("#turns > #job-4")
        await expect(alone.locator("[data-told=delta]")).to_have_text("Not ")
        assert await page.evaluate("window.isTheSame"), "all of that without a reload"
        tree = (
            await api.get(f"/api/conversations/{(await api.get('/api/jobs/1')).json()['conversation_id']}/tree")
        ).json()
        assert [turn["parent"] for turn in tree["turns"]] == [None, None, None, 2]
        # Asked elsewhere, an answer comes beside the one that is just written.
        await api.post("/api/jobs/4/regenerate", json={"model": "smollm2"})
        await expect(column(page, 5).locator(".state")).to_contain_text("Waits")
        await expect(column(page, 4).locator("[data-told=delta]")).to_have_text("Not ")
        await expect(page.locator(".bubble")).to_have_text(["Tell me a story.", "And later?"])
        ids = await page.locator("#turns > li").evaluate_all("(all) => all.map((one) => one.id)")
        assert ids == ["prompt-0", "job-1", "job-2", "job-3", "prompt-1", "job-4", "job-5"]
        later.touch()
        await expect(column(page, 5)).to_have_attribute("data-status", "done", timeout=20_000)
        await expect(page.locator(".chosen > .said > .markdown").last).to_have_text("Not at once.")
        assert await page.evaluate("window.isTheSame")


@pytest.mark.slow
async def test_without_javascript_boxes_and_buttons_do_the_same(
    config: Config, chromium: Browser, tmp_path: Path
) -> None:
    async with (
        serving(config) as api,
        working_in_process(config, Script(tmp_path / "script.json")),
        at_home(api, chromium, java_script_enabled=False) as browser,
    ):
        page = await browser.page("/chat/")
        await page.get_by_label("Message").fill("Hello.")
        await page.get_by_label("Compare with other models").click()
        await page.get_by_label("other", exact=True).check()
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator(".side .name")).to_have_text(["smollm2", "other"])
        await page.get_by_role("button", name="Go on with the answer of other").click()
        await expect(page.locator(".chosen .name")).to_have_text("other")
