"""A reply grows on its page while it is written; and nothing on the way holds it back."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.async_api import Browser, Page, expect

from llamalith_app.settings.config import Config
from llamalith_app.web import sse
from tests.browser.conftest import photograph, violations
from tests.browser.test_hostile import at_home
from tests.nginx import nginx
from tests.settle import eventually
from tests.streams.sse import reading
from tests.web.conftest import PASSWORD, TOKEN, make_config, serving
from tests.worker.conftest import Script, working

THOUGHT = "The dragon should be kind. <b>Not</b> too long."
PATIENT_MS = 30_000
"""For what many windows show, each of which asks less often while the server is slow."""
STORY = "Once there was a dragon 🐉 who <i>helped</i> everybody. He lived on a hill above the village and kept it warm."


@pytest.fixture
def config(tmp_path: Path, database_path: Path, redis_url: str) -> Config:
    return make_config(tmp_path, database_path, redis_url)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """The engine writes the first half of the story; then it stands still until this exists."""
    return tmp_path / "gate"


@pytest.fixture
async def api(config: Config, gate: Path, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    script = Script(tmp_path / "script.json")
    thought = f"<think>{THOUGHT}</think>"
    half = {"after": len(thought.encode()) + 40, "gate": str(gate)}
    script.write({"when": "story", "reply": thought + STORY, "step_s": 0.01, **half}, {"when": "", "reply": "Short."})
    async with serving(config) as api, working(config, script):
        yield api
        gate.touch()


class Opened:
    """A stream that the server has opened."""

    def __init__(self, follows: list[str]) -> None:
        self.follows = follows
        self.is_open = True


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Opened]:
    """All of them, in order."""
    found: list[Opened] = []
    run = sse.EventStream._run

    async def noted(stream: sse.EventStream, *asgi: Any) -> None:
        one = Opened(stream._request.query_params.getall("follow", []))
        found.append(one)
        try:
            await run(stream, *asgi)
        finally:
            one.is_open = False

    monkeypatch.setattr(sse.EventStream, "_run", noted)
    return found


async def submit(api: httpx.AsyncClient, content: str) -> None:
    answer = await api.post("/api/jobs", json={"content": content, "conversation_id": "c"})
    assert answer.status_code == 200, answer.text


async def half_written(page: Page) -> None:
    await page.wait_for_function(
        """() => document.querySelector('#job-1 [data-told="delta"]')?.textContent.length > 20"""
    )


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
async def test_a_reply_grows_on_its_page_and_thinking_is_folded(
    api: httpx.AsyncClient, chromium: Browser, gate: Path, scheme: str, width: int
) -> None:
    await submit(api, "Tell me a story.")
    viewport = {"width": width, "height": 800}
    async with at_home(api, chromium, viewport=viewport, color_scheme=scheme) as browser:
        page = await browser.page("/chat/conversations/c")
        await half_written(page)
        written = page.locator('#job-1 [data-told="delta"]')
        await expect(page.locator("#job-1")).to_have_attribute("data-status", "processing")
        assert STORY.startswith(await written.text_content() or "?")
        thinking = page.locator("#job-1 details.thinking")
        await expect(thinking.locator("p")).to_be_hidden()
        await thinking.locator("summary").click()
        await expect(thinking.locator("p")).to_have_text(THOUGHT)
        assert await violations(page) == []
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        await photograph(page, f"stream-{width}-{scheme}")
        gate.touch()
        await expect(page.locator("#job-1 .said.model > .text")).to_have_text(STORY)
        await expect(page.locator("#job-1")).to_have_attribute("data-status", "done")
        # Open as it is; after a reload folded, out of the record.
        await expect(thinking.locator("summary")).to_have_text(re.compile(r"^Thought"))
        await expect(thinking.locator("p")).to_have_text(THOUGHT)
        said = await thinking.locator("summary").text_content()
        await page.reload()
        await expect(thinking.locator("summary")).to_have_text(said or "")
        await expect(thinking.locator("p")).to_be_hidden()
        await expect(thinking.locator("p")).to_have_text(THOUGHT)


RICH = r"""## A plan

Some **bold** text, `code` and a [link](https://a.example). The formula $e^{i\pi} + 1 = 0$ in a line, and alone:

$$\vec{v} = \frac{1}{2}\sqrt{x}$$

1. first
2. second
   - nested

| name | number |
|:-----|-------:|
| one  | 1      |
| two  | 2      |

> A quote, and שלום עולם from right to left.

```python
def greet(name: str) -> str:
    return f"Hello, {name}!"  # a comment
```

"""


@pytest.mark.slow
async def test_blocks_of_a_reply_appear_one_by_one_stay_and_survive_a_reload(
    config: Config, chromium: Browser, gate: Path, tmp_path: Path
) -> None:
    script = Script(tmp_path / "rich.json")
    reply = RICH + "More words follow. " * 15 + "\n\nThe end."
    script.write({"when": "", "reply": reply, "step_s": 0.004, "after": len(RICH.encode()) + 20, "gate": str(gate)})
    async with (
        serving(config) as api,
        working(config, script),
        at_home(api, chromium, viewport={"width": 1280, "height": 900}) as browser,
    ):
        # A browser whose windows cannot share a worker: each of them has its own stream.
        await browser.context.add_init_script("delete window.SharedWorker")
        await browser.context.grant_permissions(["clipboard-read", "clipboard-write"])
        await submit(api, "Make a plan.")
        page = await browser.page("/chat/conversations/c")
        written = page.locator('#job-1 [data-told="delta"]')
        await expect(written.locator("figure .k").first).to_have_text("def", timeout=60_000)
        await expect(written.locator("> p").last).to_contain_text("More")
        await expect(written.locator(".katex")).to_have_count(2)
        await page.reload()
        await expect(written.locator("> *")).to_have_count(8)
        await expect(written.locator("ol > li")).to_have_count(2)
        await expect(written.locator("tbody > tr")).to_have_count(2)
        await expect(written.locator(".katex")).to_have_count(2)
        await written.evaluate("(one) => { window.blocks = [...one.querySelectorAll('h2, li, tr, figure, .katex')] }")
        await page.get_by_role("button", name="Copy", exact=True).click()
        await expect(page.get_by_role("button", name="Copied")).to_be_visible()
        code = RICH.partition("python\n")[2].partition("```")[0]
        assert await page.evaluate("navigator.clipboard.readText()") == code
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            assert await violations(page) == []
            await photograph(page, f"markdown-1280-{scheme}")
        await page.set_viewport_size({"width": 360, "height": 800})
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        await photograph(page, "markdown-360-dark")
        # What a button says for a moment is no block that stays.
        await expect(page.get_by_role("button", name="Copied")).to_have_count(0)
        # A new stream goes on where the old one was: what the page has stays, and the rest follows.
        await hide(page, hidden=True)
        async with page.expect_request("**/chat/stream?*follow=1%3A1.1-*"):
            await hide(page, hidden=False)
        gate.touch()
        await expect(written).to_contain_text("follow. More words", timeout=20_000)
        assert await page.evaluate("window.blocks.length > 8 && window.blocks.every((one) => one.isConnected)")
        await expect(page.locator("#job-1")).to_have_attribute("data-status", "done", timeout=60_000)
        stored = page.locator("#job-1 .markdown")
        await expect(stored.locator("> p").last).to_have_text("The end.")
        await expect(stored.locator(".katex")).to_have_count(2)
        assert await page.evaluate("window.blocks.every((one) => one.isConnected)"), "nor does its end touch them"
        streamed = await stored.evaluate("(one) => one.innerHTML")
        await page.reload()
        await expect(stored.locator(".katex")).to_have_count(2)
        assert await stored.evaluate("(one) => one.innerHTML") == streamed


@pytest.mark.slow
async def test_a_page_that_is_hidden_and_shown_again_has_the_text_once(
    api: httpx.AsyncClient, chromium: Browser, gate: Path
) -> None:
    await submit(api, "Tell me a story.")
    async with at_home(api, chromium) as browser:
        page = await browser.page("/chat/conversations/c")
        await half_written(page)
        await hide(page, hidden=True)
        await hide(page, hidden=False)
        gate.touch()
        await page.wait_for_function(
            """() => document.querySelector('#job-1 [data-told="delta"]')?.textContent.length > 40
                     || document.querySelector('#job-1[data-status=done]')"""
        )
        assert STORY.startswith(await page.locator("#job-1 .said.model > .text").text_content() or "?")
        await expect(page.locator("#job-1 .said.model > .text")).to_have_text(STORY)


@pytest.mark.slow
async def test_a_stream_is_opened_again_after_the_connection_was_away(
    api: httpx.AsyncClient, chromium: Browser, gate: Path, streams: list[Opened]
) -> None:
    await submit(api, "Tell me a story.")
    async with at_home(api, chromium) as browser:
        page = await browser.page("/chat/conversations/c")
        await half_written(page)
        # The stream's own connection says nothing of it: only the list does.
        before = len(streams)
        await page.route("**/conversation/turns**", lambda route: route.abort(), times=1)

        async def is_opened_again() -> bool:
            return len(streams) > before

        await eventually(is_opened_again)
        gate.touch()
        await expect(page.locator("#job-1 .said.model > .text")).to_have_text(STORY)


@pytest.mark.slow
async def test_who_turns_back_while_text_comes_is_left_there_and_is_taken_along_at_the_end_again(
    api: httpx.AsyncClient, chromium: Browser, gate: Path
) -> None:
    await submit(api, "Tell me a story.")
    script = """() => {
        const Real = SharedWorker
        window.SharedWorker = class extends Real {
            constructor(...all) {
                super(...all)
                const post = this.port.postMessage.bind(this.port)
                this.port.postMessage = (wanted) => { window.wanted = wanted ?? window.wanted; post(wanted) }
                window.stream = this.port
            }
        }
        window.say = (text) => window.stream.onmessage(
            { data: { ...window.wanted, kind: "more", data: { job: 1, attempt: 1, block: 0, text } } })
        window.toEnd = () => document.documentElement.scrollHeight - innerHeight - document.documentElement.scrollTop
    }"""
    async with at_home(api, chromium, viewport={"width": 800, "height": 600}) as browser:
        await browser.context.add_init_script(f"({script})()")
        page = await browser.page("/chat/conversations/c")
        # The engine's own text would replace what the test says behind it.
        await expect(page.locator('#job-1 [data-told="delta"]')).to_contain_text("<i>help")
        await page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        await page.evaluate("say('word '.repeat(3000))")
        await page.wait_for_function("() => document.documentElement.scrollHeight > 3000 && toEnd() < 1")
        await page.evaluate("document.activeElement.blur()")
        await page.evaluate("window.saying = setInterval(() => say('more '), 20)")
        for _ in range(4):
            await page.keyboard.press("ArrowUp")
        await page.wait_for_function("() => toEnd() > 60")
        stood = await page.evaluate("document.documentElement.scrollTop")
        await page.wait_for_function(f"() => toEnd() > {await page.evaluate('toEnd()')} + 100")
        assert await page.evaluate("document.documentElement.scrollTop") <= stood
        await page.keyboard.press("End")
        await page.wait_for_function("() => toEnd() < 1")
        height = await page.evaluate("document.documentElement.scrollHeight")
        await page.wait_for_function(f"() => document.documentElement.scrollHeight > {height} + 100 && toEnd() < 40")
        await page.evaluate("clearInterval(window.saying)")


@pytest.mark.slow
async def test_what_is_selected_in_one_s_own_message_stays_selected_when_the_reply_ends(
    api: httpx.AsyncClient, chromium: Browser, gate: Path
) -> None:
    await submit(api, "Tell me a story.")
    async with at_home(api, chromium) as browser:
        page = await browser.page("/chat/conversations/c")
        await half_written(page)
        mine = page.locator("#job-1 .said.you .text")
        await mine.evaluate("(text) => getSelection().selectAllChildren(text)")
        gate.touch()
        await expect(page.locator("#job-1")).to_have_attribute("data-status", "done")
        assert await page.evaluate("getSelection().toString()") == "Tell me a story."


async def hide(page: Page, *, hidden: bool) -> None:
    await page.evaluate(
        """(hidden) => {
            Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden })
            document.dispatchEvent(new Event("visibilitychange"))
        }""",
        hidden,
    )


@pytest.mark.slow
async def test_a_window_keeps_its_branch_and_drops_what_another_one_deleted(
    api: httpx.AsyncClient, chromium: Browser, gate: Path
) -> None:
    for content in ("Tell me a story.", "second", "third"):
        await submit(api, content)
    async with at_home(api, chromium) as browser:
        page = await browser.page("/chat/conversations/c")
        await half_written(page)
        await api.post("/api/jobs/2/cancel")
        assert (await api.delete("/api/conversations/c/turns/2")).status_code == 200
        await expect(page.locator("#job-2")).to_have_count(0)
        await expect(page.locator("#turns > li")).to_have_count(2)
        await api.post("/api/conversations/c/reply", json={"content": "edited elsewhere", "parent": 1})
        await page.fill("#content", "to the one that I see")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#job-5")).to_be_visible()
        await expect(page.locator("#turns > li")).to_have_count(3)
        await page.evaluate("window.isTheSame = true")
        await api.post("/api/jobs/5/cancel")
        assert (await api.delete("/api/conversations/c/turns/5")).status_code == 200
        await page.wait_for_function("() => !window.isTheSame")
        await expect(page.locator("#job-5")).to_have_count(0)
        gate.touch()
        await expect(page.locator("#job-1 .said.model > .text")).to_have_text(STORY)


@pytest.mark.slow
async def test_nginx_holds_no_event_back(api: httpx.AsyncClient, gate: Path, tmp_path: Path) -> None:
    await submit(api, "Tell me a story.")
    (tmp_path / "nginx").mkdir()
    port = api.base_url.port
    assert port is not None
    async with nginx(tmp_path / "nginx", port) as base:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with (
            httpx.AsyncClient(base_url=base, headers=headers, timeout=20, trust_env=False) as outside,
            reading(outside, "/chat/api/jobs/1/events") as reader,
        ):
            source = reader.events()
            assert (await anext(source)).kind == "progress"
            async for event in source:
                if event.kind == "delta":
                    break
            # It came while the engine stands still: nothing pushed it through.
            assert (await api.get("/api/jobs/1")).json()["status"] == "processing"
            gate.touch()
            assert [event.kind async for event in source][-1] == "done"


async def story_in(api: httpx.AsyncClient, conversation_id: str) -> None:
    answer = await api.post("/api/jobs", json={"content": "A story.", "conversation_id": conversation_id})
    assert answer.status_code == 200, answer.text


@pytest.mark.slow
async def test_seven_windows_that_follow_replies_take_one_connection_and_all_of_them_know_what_happens_elsewhere(
    api: httpx.AsyncClient, chromium: Browser, gate: Path, streams: list[Opened]
) -> None:
    """A browser opens six connections to a host."""
    for n in range(1, 8):
        await story_in(api, f"c{n}")
    async with at_home(api, chromium, viewport={"width": 1280, "height": 900}) as browser:
        # A window that goes without a word, as one that crashes.
        await browser.context.add_init_script(
            """for (const kind of ["visibilitychange", "pagehide"]) {
                addEventListener(kind, (event) => window.isDying && event.stopImmediatePropagation(), true)
            }"""
        )
        pages = [await browser.page(f"/chat/conversations/c{n}") for n in range(1, 8)]
        for page in pages:
            await page.evaluate("window.isTheSame = true")

        def open_now() -> list[list[str]]:
            return [one.follows for one in streams if one.is_open]

        async def follow(count: int) -> bool:
            return [len(follows) for follows in open_now()] == [count]

        # Four replies are written, three wait.
        for n, page in enumerate(pages[:4], 1):
            await page.wait_for_function(
                f"""() => document.querySelector('#job-{n} [data-told="delta"]')?.textContent.length > 20"""
            )
        await eventually(lambda: follow(7))
        eighth = await browser.page("/chat/")
        sidebar = eighth.locator("#chats")
        await expect(sidebar.get_by_label("A reply is being written")).to_have_count(4, timeout=PATIENT_MS)
        await expect(sidebar.get_by_label("Waits for its turn")).to_have_count(3, timeout=PATIENT_MS)
        assert await violations(eighth) == []
        await photograph(eighth, "sidebar-states")
        await eventually(lambda: follow(7))

        await pages[5].evaluate("window.isDying = true")
        await pages[5].close()
        waits = pages[6].locator("#job-7 .you .text")
        await expect(waits).to_have_text("A story.", timeout=PATIENT_MS)
        assert (await api.patch("/api/jobs/7", json={"content": "A story, edited elsewhere."})).status_code == 200
        await expect(waits).to_have_text("A story, edited elsewhere.", timeout=PATIENT_MS)

        elsewhere = pages[0].locator(".elsewhere")
        await story_in(api, "c1")
        await expect(pages[0].locator("#job-8")).to_be_visible(timeout=PATIENT_MS)
        await expect(elsewhere).to_be_hidden(timeout=PATIENT_MS)
        await api.post("/api/conversations/c1/reply", json={"content": "Beside it.", "parent": 1})
        await expect(elsewhere).to_be_visible(timeout=PATIENT_MS)
        await eventually(lambda: follow(6), within_s=30)

        # The session ends in the midst of it.
        await pages[0].fill("#content", "typed before")
        await api.post("/chat/logout")
        for page in (*pages[:5], pages[6], eighth):
            await expect(page.locator("#trouble")).to_contain_text("Your session has ended.", timeout=PATIENT_MS)
        await expect(pages[0].locator("#content")).to_have_value("typed before", timeout=PATIENT_MS)
        gate.touch()
        login = await browser.page("/chat/login")
        await login.get_by_label("Password").fill(PASSWORD)
        await login.get_by_role("button", name="Log in").click()
        for n, page in enumerate(pages, 1):
            if page.is_closed():
                continue
            await expect(page.locator(f"#job-{n} .said.model > .text")).to_have_text(STORY, timeout=PATIENT_MS)
            await expect(page.locator("#trouble")).to_be_hidden(timeout=PATIENT_MS)
            assert await page.evaluate("window.isTheSame")
        await expect(eighth.locator("#trouble")).to_be_hidden(timeout=PATIENT_MS)
        await expect(pages[0].locator("#content")).to_have_value("typed before", timeout=PATIENT_MS)
        # Only the chat that no window shows has a reply that nobody has seen.
        unread = "#chats a:has(.new:not([hidden]))"
        await expect(eighth.locator("#chats [data-status=done]")).to_have_count(7, timeout=PATIENT_MS)
        await expect(eighth.locator(unread)).to_have_count(1, timeout=PATIENT_MS)
        await expect(eighth.locator(unread)).to_have_attribute(
            "href", "/chat/conversations/c6#reply", timeout=PATIENT_MS
        )
        await eighth.locator(unread).click()
        await expect(eighth.locator("#job-6")).to_be_visible(timeout=PATIENT_MS)
        for page in (eighth, login):
            await expect(page.locator(unread)).to_have_count(0, timeout=PATIENT_MS)
