"""What a person's browser has to do: open a long conversation, show a long reply while it grows, scroll through it.

    .venv/bin/python -m bench.browser [--only assets,open,stream,scroll] [--rounds 11] [--seconds 8] [--chromium PATH]

Writes a database, starts Valkey and `llamalith web` on it, drives Chromium without a window (by playwright, which
`make dev` installs), and prints tables. There is no worker: this program publishes each reply itself, in the worker's
own way. The most of a reply of 20,000 tokens comes at once; what is measured is how its page shows the last ones, at
100 tokens a second. Takes about four minutes.

- Frames are counted by requestAnimationFrame. Without a GPU the browser draws them on the processor, so what else
  runs on the machine shows here. It does not show in what the page's own thread computes (time of the processor, so
  waiting does not count): for each update of a reply, beyond what an idle page computes. One that takes more than a
  frame of 16.7 ms costs a frame whatever the machine does.
- A layout shift is what the browser's LayoutShift entries sum up: 0 means that nothing a person reads was moved.
- Opening is measured from the start of the navigation, with the static files in the browser's cache: until there is
  something to see (first contentful paint), which is the end of the chat, and until the page's modules have run.
  From another page of the product, as people do it; and in a process that the browser starts for it. `server` is
  the wait for the answer's first byte.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from playwright.async_api import Browser, BrowserContext, CDPSession, Page, async_playwright
from redis.asyncio import Redis
from sqlalchemy import Connection, Engine

from bench.growth import redis
from bench.pages import finish, serving
from bench.table import Row, render, short
from llamalith_app.contracts.conversations import Message
from llamalith_app.contracts.jobs import JobRequest
from llamalith_app.store import workers
from llamalith_app.store.database import write_engine
from llamalith_app.store.jobs import submission, transitions
from llamalith_app.store.migrate import migrate
from llamalith_app.store.record import record_id
from llamalith_app.store.users import ADMIN_ID
from llamalith_app.streams.publisher import AttemptStream, StreamPublisher, publish_ended
from llamalith_app.web.html import ASSETS

MODEL = "smollm2"
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
VIEWPORT = {"width": 1280, "height": 800}
LONG_TURNS, SHORT_TURNS = 1000, 10
N_TOKENS, TOKENS_A_SECOND, CHARS_A_TOKEN = 20_000, 100, 4
STEP_S = 0.04
"""A worker sends the text of so long at once."""
WARM_UP = 2
FROM_ANOTHER = "from another page"
STARTS = (FROM_ANOTHER, "in a new process")
ASSETS_KB, FRAMES_A_SECOND, OPEN_MS = 80, 60, 150

WORDS = "The dragon lives on a hill above the village and keeps it warm while the winter is long and the wood is wet. "
CODE = "    total = sum(prices[name] * amount for name, amount in basket.items())  # without tax\n"


def _sections(n_chars: int) -> str:
    """As models write: headings, paragraphs, lists, code and tables by turns."""
    section = (
        "## A part of the plan\n\n" + WORDS * 4 + "\n\n" + "**Then** " + WORDS * 3 + "with `code` in it.\n\n"
        "- first " + WORDS + "\n- second " + WORDS + "\n- third\n\n"
        "```python\ndef price(basket):\n" + CODE * 8 + "```\n\n"
        "| name | amount | price |\n|---|---|---|\n" + "| an apple | 3 | 0.40 |\n" * 6 + "\n"
    )
    return (section * (n_chars // len(section) + 1))[:n_chars]


def _repeated(before: str, part: str) -> Callable[[int], str]:
    return lambda n_chars: before + part * ((n_chars - len(before)) // len(part))


REPLIES: dict[str, Callable[[int], str]] = {
    "parts as models write them": _sections,
    "one block of code": _repeated("```python\n", CODE),
    "one table": _repeated("| name | words |\n|---|---|\n", f"| a row | {WORDS} |\n"),
    "one list": _repeated("", f"- an item: {WORDS}\n"),
    "one paragraph": _repeated("", WORDS),
}

WATCH = """() => {
  const seen = window.seen = {}
  window.forget = () => Object.assign(seen, { shift: 0, frames: [], long: [], updates: 0, lastAt: 0 })
  window.forget()
  new PerformanceObserver((list) => {
    for (const one of list.getEntries()) if (!one.hadRecentInput) seen.shift += one.value
  }).observe({ type: "layout-shift" })
  new PerformanceObserver((list) => { for (const one of list.getEntries()) seen.long.push(one.duration) })
    .observe({ type: "longtask" })
  const reply = document.querySelector("[data-told=delta]")
  const changes = { childList: true, subtree: true, characterData: true }
  if (reply) new MutationObserver(() => { seen.updates += 1 }).observe(reply, changes)
  const frame = (at) => {
    if (seen.lastAt) seen.frames.push(at - seen.lastAt)
    seen.lastAt = at
    requestAnimationFrame(frame)
  }
  requestAnimationFrame(frame)
}"""
SHOWS = "(n) => document.querySelector('[data-told=delta]')?.textContent.length > n"
OPENED = """() => new Promise((resolve) => {
  const found = () => {
    const [at] = performance.getEntriesByType("navigation")
    const paint = performance.getEntriesByName("first-contentful-paint")[0]
    if (!paint || !at.loadEventEnd) setTimeout(found, 10)
    else resolve({
      server: at.responseStart - at.requestStart, painted: paint.startTime, ready: at.domContentLoadedEventEnd,
      kb: at.encodedBodySize / 1024, nodes: document.getElementsByTagName("*").length,
    })
  }
  found()
})"""


class Shown(NamedTuple):
    """What a page did for some seconds."""

    seconds: float
    frames_a_second: float
    longest_ms: float
    """Between two frames."""
    long_tasks: list[float]
    shift: float
    n_updates: int
    """How often the text of its reply changed."""
    computed_ms: float
    """By the page's thread, in all."""

    @property
    def frames(self) -> str:
        return f"{self.frames_a_second:.0f}, longest {self.longest_ms:.0f} ms"

    @property
    def tasks(self) -> str:
        return f"{len(self.long_tasks)}" + (f", longest {max(self.long_tasks):.0f} ms" if self.long_tasks else "")

    @property
    def is_smooth(self) -> bool:
        return self.frames_a_second > FRAMES_A_SECOND - 1

    @property
    def is_still(self) -> bool:
        return round(self.shift, 4) == 0


class Record:
    """A database without a worker, and what is published of it."""

    def __init__(self, path: Path) -> None:
        migrate(path)
        self.id = record_id(path)
        self._engine: Engine = write_engine(path).execution_options(durable=False)
        with self._engine.begin() as connection:
            self._worker = workers.register(
                connection,
                host="bench",
                pid=os.getpid(),
                lock_path="",
                models=[MODEL],
                n_slots=1,
                now=datetime.now(UTC),
            )

    def begin(self, connection: Connection, conversation: str, prompt: str) -> transitions.Claim:
        request = JobRequest(model=MODEL, system_prompt="", max_attempts=3)
        job = submission.NewJob(ADMIN_ID, "r", request, [Message(role="user", content=prompt)], conversation)
        submission.submit(connection, job, datetime.now(UTC))
        claimed = transitions.claim(connection, MODEL, 1, self._worker, datetime.now(UTC))
        if claimed is None:
            raise SystemExit("no job was due")
        return claimed

    def begin_one(self, conversation: str, prompt: str) -> transitions.Claim:
        with self._engine.begin() as connection:
            return self.begin(connection, conversation, prompt)

    def end(self, claimed: transitions.Claim, reply: str) -> None:
        with self._engine.begin() as connection:
            finish(connection, claimed, reply)

    def fill(self, conversation: str, n_turns: int) -> None:
        """Turns of which each third is long: prompts of a line, replies of a paragraph to a section."""
        with self._engine.begin() as connection:
            for number in range(n_turns):
                claimed = self.begin(connection, conversation, f"Tell me about part {number}. {WORDS}")
                finish(connection, claimed, _sections(2500 if number % 3 == 0 else 400))

    def close(self) -> None:
        self._engine.dispose()


class Bench(NamedTuple):
    record: Record
    redis: Redis
    browser: Browser
    client: httpx.AsyncClient
    """Logged in."""

    @asynccontextmanager
    async def window(self) -> AsyncIterator[BrowserContext]:
        context = await self.browser.new_context(viewport=VIEWPORT, service_workers="block")  # type: ignore[arg-type]
        (cookie,) = self.client.cookies.jar
        base = str(self.client.base_url).rstrip("/")
        await context.add_cookies([{"name": cookie.name, "value": cookie.value or "", "url": base}])
        try:
            yield context
        finally:
            await context.close()

    def url(self, conversation: str) -> str:
        return f"{str(self.client.base_url).rstrip('/')}/chat/conversations/{conversation}"


def assets() -> list[Row]:
    sizes = {name: len(gzip.compress(data)) / 1024 for name, data in ASSETS.items()}
    ours = {name: size for name, size in sizes.items() if not name.startswith("katex/")}
    rows = [
        Row(f"{kind} ({len(of)})", f"{sum(of.values()):.1f} KB", "", "", "", "", None)
        for kind in sorted({Path(name).suffix for name in ours})
        if (of := {name: size for name, size in ours.items() if name.endswith(kind)})
    ]
    katex = sum(size for name, size in sizes.items() if name not in ours)
    total = sum(ours.values())
    return [
        Row("all of them", f"{total:.1f} KB", "", "", "", f"≤ {ASSETS_KB} KB", total <= ASSETS_KB),
        *rows,
        Row("KaTeX, where a page has a formula", f"{katex:.0f} KB", "", "", "", "", None),
    ]


async def opening(bench: Bench, n_rounds: int) -> list[Row]:
    conversations = {"long": LONG_TURNS, "short": SHORT_TURNS}
    for name, n_turns in conversations.items():
        bench.record.fill(name, n_turns)
    seen: dict[tuple[str, str], list[dict[str, float]]] = {
        (begin, name): [] for begin in STARTS for name in conversations
    }
    async with bench.window() as context:
        watch = await Watch.open(context, "about:blank")
        for number in range(n_rounds + WARM_UP):
            for (begin, name), found in seen.items():
                await watch.page.goto("about:blank")
                if begin == FROM_ANOTHER:
                    await watch.page.goto(bench.url("").removesuffix("conversations/"), wait_until="load")
                    await asyncio.sleep(0.2)
                # Another site is another process: its thread has computed nothing else.
                before = await watch.computed_ms() if begin == FROM_ANOTHER else 0
                await watch.page.goto(bench.url(name), wait_until="load")
                opened = await watch.page.evaluate(OPENED)
                if number >= WARM_UP:
                    found.append(opened | {"computed": await watch.computed_ms() - before})
    rows = []
    for (begin, name), found in seen.items():
        parts = ("server", "computed", "painted", "ready")
        medians = {part: statistics.median(one[part] for one in found) for part in parts}
        cells = {part: f"{short(medians[part])} ({short(min(one[part] for one in found))}) ms" for part in parts}
        rows.append(
            Row(
                f"{conversations[name]:,} turns ({found[-1]['kb']:.0f} KB), {begin}",
                cells["server"],
                cells["computed"],
                cells["painted"],
                cells["ready"],
                f"≤ {OPEN_MS} ms" if begin == FROM_ANOTHER else "",
                max(medians["painted"], medians["ready"]) <= OPEN_MS if begin == FROM_ANOTHER else None,
            )
        )
    return rows


class Watch:
    """A page and its thread."""

    def __init__(self, page: Page, thread: CDPSession) -> None:
        self.page = page
        self._thread = thread

    @classmethod
    async def open(cls, context: BrowserContext, url: str) -> Watch:
        page = await context.new_page()
        await page.goto(url)
        await page.evaluate(WATCH)
        thread = await context.new_cdp_session(page)
        await thread.send("Performance.enable", {"timeDomain": "threadTicks"})
        return cls(page, thread)

    async def computed_ms(self) -> float:
        """By the page's thread since its process began."""
        found = await self._thread.send("Performance.getMetrics")
        return 1000 * float(next(one["value"] for one in found["metrics"] if one["name"] == "TaskDuration"))

    async def during(self, what: Awaitable[Any]) -> Shown:
        """What the page does while this is awaited."""
        before = await self.computed_ms()
        await self.page.evaluate("window.forget()")
        started = time.perf_counter()
        await what
        took = time.perf_counter() - started
        seen = await self.page.evaluate("window.seen")
        computed = await self.computed_ms() - before
        frames = seen["frames"] or [1000 * took]
        rate = 1000 * len(frames) / sum(frames)
        return Shown(took, rate, max(frames), seen["long"], seen["shift"], seen["updates"], computed)

    async def scroll(self, distance: int, speed: int) -> None:
        """As by a wheel; px, and px a second. Positive: towards the beginning."""
        where = {"x": VIEWPORT["width"] // 2 + 100, "y": VIEWPORT["height"] // 2}
        gesture = {"yDistance": distance, "speed": speed, "gestureSourceType": "mouse", "preventFling": True}
        await self._thread.send("Input.synthesizeScrollGesture", where | gesture)


async def _write(stream: AttemptStream, text: str, seconds: float) -> str:
    """Publishes so many seconds of the text; returns the rest."""
    due = time.monotonic()
    until = due + seconds
    n = round(TOKENS_A_SECOND * STEP_S * CHARS_A_TOKEN)
    while due < until and text:
        stream.append([("delta", text[:n])], [1] * (n // CHARS_A_TOKEN))
        text = text[n:]
        due += STEP_S
        await asyncio.sleep(max(0.0, due - time.monotonic()))
    return text


async def streaming(bench: Bench, seconds: float) -> list[Row]:
    rows = []
    for number, (kind, make) in enumerate(REPLIES.items()):
        text = make(N_TOKENS * CHARS_A_TOKEN)
        n_last = round(2.5 * seconds * TOKENS_A_SECOND * CHARS_A_TOKEN)
        conversation = f"stream-{number}"
        claimed = bench.record.begin_one(conversation, f"Write much. {WORDS}")
        stream = StreamPublisher(bench.redis, bench.record.id).open_attempt(claimed.job_id, claimed.attempt)
        for at in range(0, len(text) - n_last, 4000):
            stream.append([("delta", text[at : min(at + 4000, len(text) - n_last)])], [1])
        async with bench.window() as context:
            watch = await Watch.open(context, bench.url(conversation))
            await watch.page.wait_for_function(SHOWS, arg=len(text) // 3)
            await asyncio.sleep(1)
            idle = await watch.during(asyncio.sleep(3))
            rest = text[len(text) - n_last :]
            for when in ("at its end", "scrolled up"):
                if when == "scrolled up":
                    await watch.scroll(1500, 3000)
                    await asyncio.sleep(0.5)
                writing = asyncio.create_task(_write(stream, rest, seconds))
                shown = await watch.during(writing)
                rest = writing.result()
                own = shown.computed_ms - idle.computed_ms * shown.seconds / idle.seconds
                computed = f"{shown.n_updates / shown.seconds:.0f} x {own / max(shown.n_updates, 1):.1f} ms"
                goal = f"{FRAMES_A_SECOND} frames, shift 0"
                is_met = shown.is_smooth and shown.is_still
                rows.append(
                    Row(f"{kind}, {when}", shown.frames, shown.tasks, computed, f"{shown.shift:.4f}", goal, is_met)
                )
            stream.append([("delta", rest)], [1])
            await asyncio.sleep(1)

            async def ends(page: Page = watch.page, job_id: int = claimed.job_id) -> None:
                await publish_ended(bench.redis, bench.record.id, [job_id])
                await page.wait_for_selector(f"#job-{job_id}[data-status=done]")

            bench.record.end(claimed, text)
            shown = await watch.during(ends())
            computed = f"{shown.computed_ms:.0f} ms"
            shift = f"{shown.shift:.4f}"
            rows.append(
                Row(f"{kind}, as it ends", shown.frames, shown.tasks, computed, shift, "shift 0", shown.is_still)
            )
            await stream.publish_end()
    return rows


async def scrolling(bench: Bench, seconds: float) -> list[Row]:
    rows = []
    for number, (kind, make) in enumerate(REPLIES.items()):
        conversation = f"scroll-{number}"
        claimed = bench.record.begin_one(conversation, f"Write much. {WORDS}")
        bench.record.end(claimed, make(N_TOKENS * CHARS_A_TOKEN))
        async with bench.window() as context:
            watch = await Watch.open(context, bench.url(conversation))
            await asyncio.sleep(1)
            shown = await watch.during(watch.scroll(round(3000 * seconds), 3000))
            computed = f"{shown.computed_ms / shown.seconds / FRAMES_A_SECOND:.1f} ms"
            goal = f"{FRAMES_A_SECOND} frames"
            rows.append(Row(kind, shown.frames, shown.tasks, computed, f"{shown.shift:.4f}", goal, shown.is_smooth))
    return rows


async def measure(folder: Path, options: argparse.Namespace, only: set[str]) -> bool:
    """Prints the tables. Whether every goal was met."""
    tables: list[tuple[list[Row], Sequence[str]]] = []
    path = folder / "browser.db"
    record = Record(path)
    if "assets" in only:
        tables.append((assets(), ("our own files", "compressed", "", "", "", "goal", "met")))
    async with (
        redis(folder) as redis_url,
        serving(path, redis_url) as (client, _),
        Redis.from_url(redis_url) as asked,
        async_playwright() as playwright,
    ):
        browser = await playwright.chromium.launch(executable_path=options.chromium, args=FLAGS)
        bench = Bench(record, asked, browser, client)
        if "open" in only:
            head = (
                "opened: median (best)",
                "server",
                "page's thread",
                "something to see",
                "modules have run",
                "goal",
                "met",
            )
            tables.append((await opening(bench, options.rounds), head))
        if "stream" in only:
            head = (
                "20,000 tokens, written",
                "frames a second",
                "tasks above 50 ms",
                "updates a second, computed for each",
                "shift",
                "goal",
                "met",
            )
            tables.append((await streaming(bench, options.seconds), head))
        if "scroll" in only:
            head = (
                "20,000 tokens, scrolled by 3,000 px/s",
                "frames a second",
                "tasks above 50 ms",
                "computed for a frame",
                "shift",
                "goal",
                "met",
            )
            tables.append((await scrolling(bench, options.seconds), head))
        await browser.close()
    record.close()
    for rows, its_head in tables:
        print(f"\n{render(rows, its_head)}")
    return all(one.is_met is not False for rows, _ in tables for one in rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="assets,open,stream,scroll")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    started, before = time.perf_counter(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="llamalith-browser-") as folder:
        is_met = asyncio.run(measure(Path(folder), options, set(options.only.split(","))))
    print(
        f"\n{time.perf_counter() - started:.0f} s, load {before:.1f} at the start, {os.getloadavg()[0]:.1f} at the end"
    )
    if not is_met:
        sys.exit(1)


if __name__ == "__main__":
    main()
