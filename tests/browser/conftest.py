"""A real Chromium.

Every page that a test opens is watched: a script error, a dialog, a breach of the content policy or a request to
another host fails the test.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from axe_playwright_python.base import AXE_SCRIPT
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, FloatRect, Page, Request, async_playwright

from tests.needs import need

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "screenshots"
WIDE, NARROW = 1280, 360
"""Of a window, in px."""
PLAIN_HOST = "llamalith.test"
"""A name of this machine that a browser does not trust over plain http as it does 127.0.0.1."""
NOT_WANTED = (
    # Playwright's own list, of which Chromium takes none where another follows.
    *("AvoidUnnecessaryBeforeUnloadCheckSync", "DestroyProfileOnBrowserClose", "HttpsUpgrades"),
    *("HttpsFirstBalancedModeAutoEnable", "LensOverlay", "MediaRouter", "PaintHolding"),
    *("ThirdPartyStoragePartitioning", "AvoidCorsURLLoaderRestartOnRedirect", "OptimizationHints"),
    *("NetworkTimeServiceQuerying", "AimEnabled", "PreconnectToSearch"),
    # What drops down from the address bar: two pages in each window, which cost more than those of the tests.
    *("WebUIOmniboxPopup", "WebUIOmniboxAimPopup", "WebUIOmniboxFullPopup"),
)
"""Features of Chromium."""
FLAGS = [
    f"--disable-features={','.join(NOT_WANTED)}",
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"),
    f"--host-resolver-rules=MAP {PLAIN_HOST} 127.0.0.1",
]


class Watched:
    """A browser window and everything in it that should not have happened."""

    def __init__(self, context: BrowserContext, base: str) -> None:
        self.context = context
        self.base = base
        self.bad: list[str] = []
        self.requests: list[str] = []
        context.on("page", self._watch)
        context.on("request", self._on_request)
        context.on("console", self._on_console)
        context.on("weberror", lambda error: self.bad.append(f"script error: {error.error}"))
        context.on("dialog", self._on_dialog)

    async def page(self, path: str | None = None) -> Page:
        page = await self.context.new_page()
        if path is not None:
            await page.goto(self.base + path)
        return page

    def _watch(self, page: Page) -> None:
        page.on("crash", lambda _: self.bad.append("the page crashed"))

    def _on_request(self, request: Request) -> None:
        self.requests.append(request.url)
        if urlsplit(request.url).netloc != urlsplit(self.base).netloc and not request.url.startswith("data:"):
            self.bad.append(f"request to another host: {request.url}")

    def _on_console(self, message: ConsoleMessage) -> None:
        # What the server answered is the test's own business; the rest of the errors is ours.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.bad.append(f"console: {message.text}")

    async def _on_dialog(self, dialog: Any) -> None:
        self.bad.append(f"dialog: {dialog.message}")
        await dialog.dismiss()


def pytest_itemcollected(item: pytest.Item) -> None:
    """A browser belongs to the event loop that started it, so these tests share one, and their fixtures do."""
    if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.function):
        item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
    with pytest.MonkeyPatch.context() as patch:
        if inspect.isasyncgenfunction(fixturedef.func):
            # What `loop_scope=` does, for fixtures of other folders too; they keep their own loops for other tests.
            patch.setattr(fixturedef.func, "_loop_scope", "session", raising=False)
        return (yield)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def running_chromium() -> AsyncIterator[Browser]:
    """Runs as long as the tests: its start takes seconds."""
    async with async_playwright() as playwright:
        yield await playwright.chromium.launch(
            executable_path=need("chromium", "chromium"),
            args=FLAGS,
            # As people have it: Back brings a page as it was left.
            ignore_default_args=["--disable-back-forward-cache"],
        )


@pytest.fixture
async def chromium(running_chromium: Browser) -> AsyncIterator[Browser]:
    """For a test, which has windows of its own in it."""
    yield running_chromium
    for context in running_chromium.contexts:
        await context.close()


@asynccontextmanager
async def window(chromium: Browser, base: str, **options: Any) -> AsyncIterator[Watched]:
    # A service worker would take requests out of the hands of a test; the one that wants it asks for it.
    context = await chromium.new_context(**{"service_workers": "block"} | options)
    watched = Watched(context, base)
    yield watched
    await context.close()
    assert watched.bad == []


def is_looked_at_by_axe(width: int, scheme: str) -> bool:
    """Of four views of a page two have each width and each set of colours."""
    return (width > NARROW) == (scheme == "light")


async def violations(page: Page, *, but: str | None = None) -> list[str]:
    """What axe-core finds wrong on a page, each with its first place. `but`: a rule that is not looked at."""
    if not await page.evaluate("'axe' in window"):
        await page.evaluate(f"{{ {AXE_SCRIPT} }}")
    found: list[str] = await page.evaluate(
        """(but) => axe.run({ resultTypes: ["violations"], rules: but ? { [but]: { enabled: false } } : {} }).then(
            ({ violations }) => violations.map(
                ({ id, help, nodes }) => `${location}: ${id}: ${help}: ${nodes[0].html.slice(0, 200)}`))""",
        but,
    )
    return found


async def photograph(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    width, height = await page.evaluate("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
    # Nobody looks further down, and the reference as a whole takes seconds.
    clip: FloatRect = {"x": 0, "y": 0, "width": width, "height": min(height, 3000)}
    await page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True, clip=clip)
