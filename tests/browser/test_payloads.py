"""A thousand hostile texts and more, in every place of the pages where a text of a person, a model or a file comes out.

Each place must show the text as it is: a page that took a part of it for something else shows less, whether it runs or
not. What a payload would run or fetch names its number, and so does an element that it made.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import shlex
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

import httpx
import msgspec
import pytest
from playwright.async_api import Browser, Page, Route, expect
from redis.asyncio import Redis
from sqlalchemy import Connection

from llamalith_app.contracts.models import EngineStatus
from llamalith_app.contracts.text import CONTROL_FREE
from llamalith_app.controllers.pages.conversations import CONVERSATIONS_ON_PAGE
from llamalith_app.controllers.pages.jobs import JOBS_ON_PAGE
from llamalith_app.settings.config import Config, ModelConfig
from llamalith_app.store import conversation_changes, workers
from llamalith_app.store.conversation_changes import Change
from llamalith_app.store.conversation_list import first_words
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import submission, transitions
from llamalith_app.store.record import record_id
from llamalith_app.store.users import ADMIN_ID
from llamalith_app.streams.publisher import StreamPublisher
from llamalith_app.web.html import conversation_url
from llamalith_app.web.markdown import render
from llamalith_app.web.visible import Kind, visible
from tests.browser.conftest import Watched
from tests.browser.payloads import HOST, PAYLOADS, SAMPLES, SHAPES, TEXTS, Payload
from tests.browser.test_hostile import at_home
from tests.store.samples import NOW, fail, finish, prompt, register_worker
from tests.web import pdfs
from tests.web.conftest import make_config, serving

pytestmark = pytest.mark.slow

REPORTS = """
window.ran = (number) => console.error(`payload ${[number].flat()[0]} ran`)
addEventListener("securitypolicyviolation", ({ violatedDirective, blockedURI, target }) => {
    console.error(`policy: ${violatedDirective} ${blockedURI} ${target.outerHTML?.slice(0, 200)}`)
})
"""
MADE_BY_A_TEXT = """() => {
    const foreign = "iframe, frame, object, embed, applet, base, style, video, audio, source, template, dialog, x,"
        + "marquee, meta[http-equiv], noembed, xmp, plaintext, math:not(.katex math),"
        + "svg :is(a, script, style, image, foreignObject, animate, set, feImage)"
    const isElsewhere = (one) => one.matches("link, script, img")
        && !(one.href ?? one.src).startsWith(`${location.origin}/chat/static/`)
    const isHostile = ({ name, value }) => name.startsWith("on") || name === "style" || name === "srcdoc"
        || (/^(href|xlink:href|src|action|formaction|data|background|poster|ping)$/.test(name)
            && /^\\s*(\\/\\/|\\w*script:|data:)/i.test(value))
    const isOurs = (one, { name }) => name === "style" && one.closest(".katex")
    return [...document.querySelectorAll("*")]
        .filter((one) => one.matches(foreign) || isElsewhere(one)
            || [...one.attributes].some((a) => isHostile(a) && !isOurs(one, a)))
        .map((one) => one.outerHTML.slice(0, 200))
}"""
"""What stands on the page and was made by a text. The pages themselves have nothing of that."""
# Without the buttons that a script adds, and with the source of each formula.
RENDERED = """(texts) => texts.map((text) => {
    const copy = text.cloneNode(true)
    for (const button of copy.querySelectorAll("button")) button.remove()
    for (const formula of copy.querySelectorAll(".math")) formula.textContent = formula.dataset.tex
    return copy.textContent
})"""
ALL_TYPESET = """() => {
    const formulas = [...document.querySelectorAll(".math")]
    return formulas.length && formulas.every((one) => one.matches(".failed") || one.querySelector(".katex"))
}"""
"""Or refused by KaTeX."""
SAFE_SCHEMES = ("http:", "https:", "mailto:")
HOSTILE_MODELS = [payload.text for payload in SAMPLES if re.match(CONTROL_FREE, payload.text)]
REASONS = dict(zip(HOSTILE_MODELS, TEXTS, strict=False))


@pytest.fixture
def config(tmp_path: Path, database_path: Path, redis_url: str) -> Config:
    config = make_config(tmp_path, database_path, redis_url)
    hostile = [ModelConfig(name=name, path=tmp_path / "absent.gguf") for name in HOSTILE_MODELS]
    return msgspec.structs.replace(config, models=(*config.models, *hostile))


@pytest.fixture
async def client(config: Config) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(config) as client:
        yield client


@asynccontextmanager
async def watching(client: httpx.AsyncClient, chromium: Browser) -> AsyncIterator[Watched]:
    # Small, since nobody looks at what is drawn.
    async with at_home(client, chromium, viewport={"width": 500, "height": 200}) as browser:
        await browser.context.add_init_script(REPORTS)
        yield browser


async def check(page: Page) -> None:
    assert await page.evaluate(MADE_BY_A_TEXT) == [], page.url


async def texts_of(page: Page, selector: str, kind: str = "textContent") -> list[str]:
    """`kind`: the property of each element that is meant."""
    texts: list[str] = await page.locator(selector).evaluate_all("(all, kind) => all.map((one) => one[kind])", kind)
    return texts


async def rendered(page: Page) -> list[str]:
    texts: list[str] = await page.locator(".markdown").evaluate_all(RENDERED)
    return texts


def differing(shown: Sequence[str], expected: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs that are not the same; a list of 1,500 texts is no message to read."""
    assert len(shown) == len(expected)
    return [pair for pair in zip(shown, expected, strict=True) if pair[0] != pair[1]][:5]


class _Texts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def text_in(html: str) -> str:
    parser = _Texts()
    parser.feed(html)
    parser.close()
    return "".join(parser.parts)


def is_on_one_line(text: str) -> bool:
    return re.match(CONTROL_FREE, text) is not None


def lets_others_stand(text: str) -> bool:
    """Whether what follows this Markdown is a paragraph of its own."""
    return render(f"{text}\n\nwhat follows").endswith('<p dir="auto">what follows</p>')


def packs(size: int) -> list[str]:
    """All payloads, so many in a text. One that would swallow what follows is the last of its text."""
    last = [text for text in TEXTS if not lets_others_stand(text)]
    others = [text for text in TEXTS if lets_others_stand(text)]
    begins = range(0, len(others), size)
    assert len(last) <= len(begins)
    ends = [[text] for text in last] + [[]] * (len(begins) - len(last))
    return ["\n\n".join(others[begin : begin + size] + end) for begin, end in zip(begins, ends, strict=True)]


def test_there_are_a_thousand_different_payloads() -> None:
    assert len(set(TEXTS)) == len(SHAPES) >= 1000
    assert all(len(text) <= 200 for text in TEXTS), "a title holds each"
    assert len({payload.family for payload in PAYLOADS}) >= 15


class Stored(NamedTuple):
    """What the record has of one payload: a conversation with a job."""

    payload: Payload
    public_id: str
    title: str
    tag: str
    has_failed: bool

    @property
    def name(self) -> str:
        return self.title or first_words(f"needle {self.payload.text}") or ""


def stored(payload: Payload) -> Stored:
    """Each text that may be an id, a title or a tag is one; of ten jobs three fail."""
    named = f"{payload.number} {payload.text}".strip()
    is_name = is_on_one_line(payload.text)
    return Stored(
        payload,
        named if is_name and len(named) <= 200 else str(payload.number),
        payload.text.strip() if is_name else "",
        payload.text.strip() if is_name and len(payload.text) <= 50 else "",
        payload.number % 10 < 3,
    )


ALL = [stored(payload) for payload in PAYLOADS]
SHOWN = ALL[::-1]
"""As lists have them: the newest first."""


def report_models(connection: Connection) -> None:
    """A worker that is alive, and could load none of the hostile models."""
    now = datetime.now(UTC)
    worker = workers.register(
        connection, host=HOSTILE_MODELS[0], pid=1, lock_path="", models=HOSTILE_MODELS, n_slots=1, now=now
    )
    states = [EngineStatus(model=name, state="failed", reason=text, n_slots=1) for name, text in REASONS.items()]
    workers.heartbeat(connection, worker, now, msgspec.json.encode(states).decode())


def store_all(connection: Connection) -> None:
    """Each payload as a conversation, title, tag, prompt and reply or failure; then packs of them in one chat."""
    worker = register_worker(connection)
    for number, one in enumerate(ALL):
        text = one.payload.text
        now = NOW + timedelta(seconds=number)
        model = HOSTILE_MODELS[number % len(HOSTILE_MODELS)]
        submission.submit(connection, prompt(f"needle {text}", one.public_id, model=model), now)
        claim = transitions.claim(connection, model, 1, worker, now)
        assert claim is not None
        if one.has_failed:
            fail(connection, claim, reason=text, pause=None)
        else:
            finish(connection, claim, text)
        tags = [one.tag] if one.tag else []
        changed = conversation_changes.change(
            connection, ADMIN_ID, [one.public_id], Change(title=one.title, tags=tags), now
        )
        assert changed == [one.public_id]
    for number, pack in enumerate(pack for pack in PACKS for _ in range(2)):
        asked, answered, others = (pack, "short", "") if number % 2 == 0 else ("short", pack, pack)
        new = prompt(
            asked,
            "packs",
            context=others,
            model=HOSTILE_MODELS[0],
            grammar_name=HOSTILE_MODELS[1],
            stop=STOPS,
            system_prompt=others,
        )
        submission.submit(connection, new, NOW + timedelta(days=1))
        claim = transitions.claim(connection, HOSTILE_MODELS[0], 1, worker, NOW)
        assert claim is not None
        finish(connection, claim, answered)
    for name in NAMES:
        submission.submit(connection, prompt(name, name, model=HOSTILE_MODELS[0]), NOW + timedelta(days=2))
        change = Change(title=name, tags=[name[:50].strip()])
        conversation_changes.change(connection, ADMIN_ID, [name], change, NOW)


PACKS = packs(160)
STOPS = [text[:64] for text in TEXTS[:: len(TEXTS) // 16]][:16]
FIRST_PACK = len(ALL) + 1
"""The id of its job."""


def names() -> list[str]:
    """Some that break out of attributes and elements, as many in a text as a name may have characters."""
    found = [""]
    for payload in PAYLOADS:
        if payload.family in ("ways out", "attributes") and payload.number % 11 == 0 and is_on_one_line(payload.text):
            if len(found[-1]) + len(payload.text) >= 200:
                found.append("")
            found[-1] = f"{found[-1]} {payload.text}".strip()
    return found


NAMES = names()
TAGS = [text for text in TEXTS if is_on_one_line(text) and len(text) <= 50][:20]
N_JOBS = len(ALL) + 2 * len(PACKS) + len(NAMES)


async def bring(page: Page, listed: str, address: str) -> None:
    """Lets the page's own script bring another part of its list, as it brings what has changed. The list is not drawn
    from then on, which would take most of the time."""
    await page.evaluate(
        """async ([id, address]) => {
            const list = document.getElementById(id)
            list.closest("main").hidden = true
            list.dataset.live = address
            document.dispatchEvent(new Event("visibilitychange"))
            while (list.dataset.live === address) await new Promise(requestAnimationFrame)
        }""",
        [listed, f"{address}&again=1"],
    )
    await check(page)


async def cursors(client: httpx.AsyncClient) -> AsyncIterator[int]:
    """Where the later parts of the list of conversations begin."""
    path = f"/api/conversations?q=needle&limit={CONVERSATIONS_ON_PAGE}"
    cursor = (await client.get(path)).json()["next"]
    while cursor is not None:
        yield cursor
        cursor = (await client.get(f"{path}&before={cursor}")).json()["next"]


async def test_each_payload_that_is_stored_is_shown_as_the_text_that_it_is(
    client: httpx.AsyncClient, chromium: Browser, database: Database
) -> None:
    await database.write(store_all)
    async with watching(client, chromium) as browser:
        page = await browser.page("/chat/conversations?q=needle")
        await check(page)
        fields = {
            ".conversation .first .line": ("textContent", [visible(one.name, Kind.EXCERPT) for one in SHOWN]),
            ".conversation .first input": ("value", [one.public_id for one in SHOWN]),
            ".conversation input[name=title]": ("value", [one.title for one in SHOWN]),
            ".conversation .tag": ("textContent", [visible(one.tag) for one in SHOWN if one.tag]),
            ".conversation .snippet mark": ("textContent", ["needle" for _ in SHOWN]),
        }
        shown = {at: await texts_of(page, at, kind) for at, (kind, _) in fields.items()}
        async for cursor in cursors(client):
            await bring(page, "conversations", f"/chat/conversation/list?q=needle&before={cursor}")
            for at, (kind, _) in fields.items():
                shown[at] += await texts_of(page, at, kind)
        for at, (_, expected) in fields.items():
            assert differing(shown[at], expected) == [], at

        await page.goto(f"{browser.base}/chat/jobs")
        await check(page)
        prompts, replies = [], []
        for before in range(N_JOBS, 0, -JOBS_ON_PAGE):
            await bring(page, "board", f"/chat/jobs/rows?before={before + 1}")
            prompts += await texts_of(page, ".of-prompt .line")
            replies += await texts_of(page, ".of-reply .line")
        assert (
            differing(prompts[-len(SHOWN) :], [visible(f"needle {one.payload.text}", Kind.EXCERPT) for one in SHOWN])
            == []
        )
        assert differing(replies[-len(SHOWN) :], [visible(one.payload.text, Kind.EXCERPT) for one in SHOWN]) == []

        await page.goto(f"{browser.base}/chat/conversations/packs")
        await page.wait_for_function(ALL_TYPESET)
        await check(page)
        asked = [text for pack in PACKS for text in (pack, "short")]
        assert differing(await texts_of(page, ".you .text"), asked) == []
        assert differing(await texts_of(page, ".system .text"), PACKS) == []
        assert differing(await texts_of(page, ".said.model > p.text"), PACKS) == []
        answered = [text_in(render(text)) for pack in PACKS for text in ("short", pack)]
        assert differing(await rendered(page), answered) == []
        links = await page.locator(".markdown a").evaluate_all("(links) => links.map((one) => [one.href, one.rel])")
        assert len(links) > 30
        # `[x]()` is a link to nowhere.
        assert [one for one in links if not (one[0].startswith(SAFE_SCHEMES) and "noopener" in one[1]) and one[0]] == []
        assert await page.locator(".markdown :is(img, svg image, [src])").count() == 0
        assert await page.locator(".katex").count() > 30
        assert await page.locator(".katex a").count() == 0
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")

        for pack, job_id in zip(PACKS, itertools.count(FIRST_PACK, 2), strict=False):
            await page.goto(f"{browser.base}/chat/jobs/{job_id}")
            await check(page)
            assert (await texts_of(page, "[aria-labelledby=prompt-heading] > pre"))[0] == pack
            pairs = await texts_of(page, ".pairs dd")
            assert pairs[0] == visible(HOSTILE_MODELS[0])
            assert pairs[-1] == visible(str(tuple(STOPS)), Kind.EXCERPT)
            command, raw = await texts_of(page, "[data-command]")
            assert json.loads(raw)["user_input"] == pack
            assert json.loads(shlex.split(command)[-1])["content"] == pack
            await bring(page, "board", f"/chat/jobs/{job_id + 1}/state?x=")
            assert await texts_of(page, "#reply pre") == [pack]
        await page.goto(f"{browser.base}/chat/jobs/{FIRST_PACK}/again")
        await check(page)
        assert await texts_of(page, "#content", "value") == PACKS[:1]

        for name in NAMES:
            await page.goto(browser.base + conversation_url(name))
            await check(page)
            assert await texts_of(page, "h1 .line") == [visible(name, Kind.EXCERPT)]
            assert set(await texts_of(page, "#title, [name=conversation_id]", "value")) == {name}
            words = {"q": name, "tag": name[:50].strip()}
            await page.goto(f"{browser.base}/chat/conversations?{urlencode(words)}")
            await check(page)
            assert await texts_of(page, "#q", "value") == [name]
            await page.goto(
                f"{browser.base}/chat/jobs/bulk?{urlencode({'action': 'cancel', 'q': name, 'model': name})}"
            )
            await check(page)
            assert await texts_of(page, ".matched dd") == [name, name]
        await page.goto(f"{browser.base}/chat/conversations?{urlencode({'source': NAMES[0]})}")
        await check(page)
        await expect(page.get_by_role("heading", level=1)).to_have_text("Bad input")

        await database.write(report_models)
        await page.goto(f"{browser.base}/chat/status")
        await check(page)
        reasons = [visible(text, Kind.EXCERPT) for text in REASONS.values()]
        assert await texts_of(page, "#models .why") == ["", "", *reasons]
        assert await texts_of(page, "#models .name") == ["smollm2", "other", *map(visible, HOSTILE_MODELS)]
        assert visible(HOSTILE_MODELS[0]) in (await texts_of(page, "#workers"))[0]


async def test_each_payload_that_a_person_types_attaches_or_imports_is_text(
    client: httpx.AsyncClient, chromium: Browser
) -> None:
    async with watching(client, chromium) as browser:
        page = await browser.page("/chat/")
        await send_in_vain(page)
        await page.goto(f"{browser.base}/chat/")
        await attach_and_send(page)
        await page.goto(f"{browser.base}/chat/conversations")
        await import_file(page)
        await page.goto(f"{browser.base}/chat/conversations")
        await expect(page.locator(".conversation .tag")).to_have_text([visible(tag) for tag in sorted(TAGS)])
        await check(page)


async def send_in_vain(page: Page) -> None:
    """The form comes back with all that was typed."""
    fields = {"system_prompt": "\n".join(TEXTS), "stop": "\n".join(STOPS), "seed": TEXTS[0][:40]}
    async with page.expect_navigation():
        await page.evaluate(
            """(fields) => {
                const form = document.querySelector("form.prompt")
                for (const [name, value] of Object.entries(fields)) form.elements[name].value = value
                form.submit()
            }""",
            fields,
        )
    await expect(page.get_by_role("heading", name="Not sent yet")).to_be_visible()
    await check(page)
    assert {name: (await texts_of(page, f"[name={name}]", "value"))[0] for name in fields} == fields


async def attach_and_send(page: Page) -> None:
    """Files with hostile names and texts, one of them a PDF; first the server refuses them."""
    await page.locator("[name=seed]").evaluate("(field) => { field.value = '' }")
    packed = ["\n".join(TEXTS[begin::40]) for begin in range(40)]
    file_names = itertools.cycle([payload.text.replace("`", "'") for payload in SAMPLES] + NAMES)
    files = [{"name": next(file_names), "text": text} for text in packed]
    in_pdf = "\n".join(text for text in TEXTS[::3] if text.isascii() and text.isprintable())
    await page.evaluate(
        """(files) => {
            const picker = document.querySelector("[data-files]")
            const chosen = new DataTransfer()
            for (const { name, text } of files) chosen.items.add(new File([text], name, { type: "text/plain" }))
            picker.files = chosen.files
            picker.dispatchEvent(new Event("change"))
        }""",
        files,
    )
    pdf = {"name": f"{SAMPLES[1].text}.pdf", "mimeType": "application/pdf", "buffer": pdfs.text_pdf(in_pdf)}
    await expect(page.locator(".attached li")).to_have_count(len(files))
    await page.locator("[data-files]").set_input_files(pdf)  # type: ignore[arg-type]
    await expect(page.locator(".attached li")).to_have_count(len(files) + 1)
    await expect(page.locator(".attached progress")).to_have_count(0)
    await check(page)

    async def refuse(route: Route) -> None:
        await route.fulfill(status=409, json={"detail": "\n".join(TEXTS)})

    await page.route("**/chat/jobs", refuse)
    await page.get_by_role("button", name="Send", exact=True).click()
    await expect(page.get_by_role("alert")).to_contain_text(TEXTS[0])
    await check(page)
    await page.unroute("**/chat/jobs")
    await page.get_by_role("button", name="Send", exact=True).click()
    await expect(page.locator("#job-1")).to_be_visible()
    await check(page)
    message = (await texts_of(page, ".you .text"))[0]
    assert [text for text in packed if text not in message] == []
    assert in_pdf[:100] in message


async def import_file(page: Page) -> None:
    """A file of another hand: its titles, tags, model names, calls of tools and messages."""
    roles = ("user", "tool", "assistant")
    messages = [
        {
            "role": roles[number % 3],
            "content": text,
            "tool_call_id": text,
            "tool_calls": [{"id": text, "type": "function", "function": {"name": text, "arguments": text}}],
        }
        for number, text in enumerate(TEXTS)
    ]
    end = [{"role": "assistant", "content": "the end"}]
    middle = len(messages) // 2
    file = {
        "format": "llamalith-conversation-1",
        "conversation_id": TEXTS[3],
        "title": NAMES[0],
        "tags": TAGS,
        "turns": [
            {"id": 1, "parent": None, "messages": messages[:middle] + end, "model": TEXTS[1], "status": TEXTS[2]},
            {"id": 2, "parent": 1, "messages": messages[middle:] + end},
        ],
    }
    await page.get_by_label("Import a conversation").set_input_files(
        {"name": f"{TEXTS[0]}.json", "mimeType": "application/json", "buffer": json.dumps(file).encode()}
    )
    await page.get_by_role("button", name="Import", exact=True).click()
    await expect(page.locator("h1")).to_have_text(visible(NAMES[0], Kind.EXCERPT))
    await check(page)
    assert differing(await texts_of(page, ".you .text"), TEXTS[0::3]) == []
    # What a model said may be shown as Markdown.
    answers = {*await texts_of(page, ".said.model > p.text"), *await rendered(page)}
    assert [text for text in TEXTS[1::3] if text not in answers] == []
    assert [text for text in TEXTS[2::3] if not answers & {text, text_in(render(text))}] == []


async def test_each_payload_of_a_reply_that_is_being_written_is_text_block_by_block(
    client: httpx.AsyncClient, chromium: Browser, database: Database, redis_url: str
) -> None:
    """Each comes in two halves, so that the open block is shown with half of it, too."""
    worker = await database.write(register_worker)
    await client.post("/api/jobs", json={"content": "x", "conversation_id": "c"})
    claim = await database.write(transitions.claim, "smollm2", 1, worker, NOW)
    assert claim is not None
    texts = [text for text in TEXTS if lets_others_stand(text)]
    thought = "\n".join(TEXTS)
    async with watching(client, chromium) as browser, Redis.from_url(redis_url) as redis:
        stream = StreamPublisher(redis, record_id(database.path)).open_attempt(claim.job_id, claim.attempt)
        page = await browser.page("/chat/conversations/c")
        stream.append([("thinking", thought)])
        for text in texts:
            half = len(text) // 2
            stream.append([("delta", text[:half])])
            await asyncio.sleep(0)
            stream.append([("delta", f"{text[half:]}\n\n")])
        stream.append([("delta", "The end")])
        written = page.locator('#job-1 [data-told="delta"]')
        await expect(written).to_contain_text("The end", timeout=30_000)
        await page.wait_for_function(ALL_TYPESET)
        await check(page)
        assert await texts_of(page, '[data-told="thinking"]') == [thought]
        reply = "\n\n".join([*texts, "The end"])
        assert await rendered(page) == [text_in(render(reply))]
        assert await page.locator(".katex a").count() == 0
        assert await database.write(finish, claim, reply)
        await stream.publish_end()
        await expect(page.locator("#job-1")).to_have_attribute("data-status", "done")
        await page.wait_for_function(ALL_TYPESET)
        await check(page)


RAW = PAYLOADS[::37]
NAMED = re.compile(rf"payload (\d+) ran|{HOST}/(\d+)")


async def test_what_runs_or_loads_is_noticed_with_its_number(client: httpx.AsyncClient, chromium: Browser) -> None:
    """The proof that the tests above can fail: pages that escape nothing."""
    async with watching(client, chromium) as browser:
        page = await browser.page()

        async def escape_nothing(route: Route) -> None:
            answer = await route.fetch()
            body = (await answer.text()).replace("</main>", "<img src=x onerror=ran(7)></main>")
            await route.fulfill(response=answer, body=body)

        await page.route("**/chat/jobs", escape_nothing)
        await page.goto(f"{browser.base}/chat/jobs")
        with pytest.raises(AssertionError, match="onerror="):
            await check(page)
        assert any(text.startswith("console: policy: script-src-attr") and "ran(7)" in text for text in browser.bad)
        browser.bad.clear()

    # Without a policy, each in a frame of its own.
    frames = "".join(f'<iframe srcdoc="{escape(payload.text)}"></iframe>' for payload in RAW)
    async with watching(client, chromium) as browser:
        await browser.context.route(f"**://{HOST}/**", lambda route: route.abort())
        await browser.context.route("**/raw", lambda route: route.fulfill(body=frames, content_type="text/html"))
        page = await browser.page("/raw")
        named = {int(found[1] or found[2]) for text in browser.bad for found in NAMED.finditer(text)}
        made = [len(await frame.evaluate(MADE_BY_A_TEXT)) > 0 for frame in page.frames[1:]]
        browser.bad.clear()
    assert named <= {payload.number for payload in RAW}
    # The others wait for a person, are Markdown, or are for a page that decodes them once more.
    assert len(named) > len(RAW) // 4
    assert sum(made) > len(RAW) // 2
