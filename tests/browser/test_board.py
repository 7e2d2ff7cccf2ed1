"""Jobs, a job, the status page, the queue's monitor and the API's reference in a real browser, with rows as people have
them: all states, very long texts, texts from right to left, emoji."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest
from playwright.async_api import Browser, Page, expect
from sqlalchemy import Connection

from llamalith_app.contracts.models import EngineStatus
from llamalith_app.settings.config import Config
from llamalith_app.store import turns, workers
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import submission, transitions
from llamalith_app.store.tables import Outcome, Source
from tests.browser.conftest import Watched, is_looked_at_by_axe, photograph, violations, window
from tests.store.samples import prompt
from tests.web.conftest import log_in, make_config, serving

pytestmark = pytest.mark.slow

PROMPTS = (
    "Summarise the minutes of Monday's meeting in five points, each with who does what until when.",
    "اكتب رسالة قصيرة إلى فريق العمل حول موعد الاجتماع القادم يوم الثلاثاء في الساعة العاشرة صباحا.",
    "🐉 Tell me about dragons 👩‍🚀 and rockets 🚀🚀",
    "def f(x):\n    return [y for y in x if y % 2]\n\nExplain this function.",
    "x" * 500,
    "word " * 5000,
    "<script>alert(1)</script> & <b>bold</b>",
    "שלום, איך אפשר לבשל שקשוקה?",
    "Translate to French: The cat sat on the mat.",
    "invoice-\u202egpj.exe",
)
REASONS = (
    ("context_overflow", "The prompt has 21,337 tokens, and the context of smollm2 has 2,048 (n_ctx). Shorten it."),
    ("model_unavailable", f"Model smollm2 could not be loaded. There is no file /models/{'deep/' * 20}model.gguf"),
)
ENGINES = [
    EngineStatus(
        model="smollm2",
        state="loaded",
        n_slots=4,
        n_used=1,
        tokens_per_s=41.2,
        job_s=12.0,
        completion_tokens=100.0,
        memory_bytes=640_000_000,
    ),
    EngineStatus(model="other", state="loading", progress=0.4, n_slots=2, memory_bytes=9_800_000_000),
]


def heartbeat(connection: Connection, worker: int) -> None:
    workers.heartbeat(connection, worker, datetime.now(UTC), msgspec.json.encode(ENGINES).decode())


def fill(connection: Connection) -> None:
    """30 jobs in all states, and one that runs."""
    now = datetime.now(UTC)
    worker = workers.register(
        connection, host="gpu-box", pid=1, lock_path="", models=["smollm2", "other"], n_slots=6, now=now
    )
    heartbeat(connection, worker)
    for n in range(26):
        at = now - timedelta(minutes=10 * (27 - n))
        source = Source.PAGE if n % 3 else Source.API
        new = prompt(PROMPTS[n % 10], f"chat {n}", model="smollm2", temperature=0.2, source=source)
        submission.submit(connection, new, at)
        started = at + timedelta(seconds=(0.4, 3, 45, 300)[n % 4])
        claim = transitions.claim(connection, "smollm2", 1, worker, started)
        if claim is None or n == 25:
            continue
        job_id, lease = claim.job_id, claim.lease_token
        end = started + timedelta(seconds=4 + n)
        if n % 5 == 3:
            kind, reason = REASONS[n // 5 % 2]
            transitions.fail(
                connection, job_id, lease, end, outcome=Outcome.FAILED, kind=kind, reason=reason, pause=None
            )
        elif n % 7 == 5:
            transitions.cancel(connection, 1, job_id, end)
        else:
            transitions.finish(
                connection,
                job_id,
                lease,
                end,
                reply_to=turns.read_turn(connection, claim.turn_id, 0).reply_to,
                reply="**Here** is the reply.\n\n" + PROMPTS[(n + 3) % 10],
                thinking="They ask for it, so it is to be short.\n\nAnd right." if n % 2 else "",
                thinking_s=1.6 if n % 2 else None,
                times=transitions.AttemptTimes(*(started + timedelta(seconds=s) for s in (1.2, 2.9, 3.0))),
                finish_reason="length" if n % 9 == 0 else "stop",
                prompt_tokens=40,
                prompt_tokens_reused=n,
                completion_tokens=12 * n + 3,
                omitted_messages=0,
            )
    for n in range(4):
        submission.submit(
            connection,
            prompt(PROMPTS[n * 3], f"wait {n}", model="smollm2", priority=("normal", "batch", "interactive")[n % 3]),
            now - timedelta(minutes=n),
        )


class Board(NamedTuple):
    client: httpx.AsyncClient
    database: Database

    @property
    def origin(self) -> str:
        return str(self.client.base_url).rstrip("/")


@pytest.fixture
def config(tmp_path: Path, database_path: Path, redis_url: str) -> Config:
    return make_config(tmp_path, database_path, redis_url)


@pytest.fixture
async def board(config: Config, database: Database) -> AsyncIterator[Board]:
    await database.write(fill)
    async with serving(config) as client:
        await log_in(client)
        yield Board(client, database)


async def opened(watched: Watched, board: Board) -> Page:
    """A page in the client's session."""
    (name, value), *_ = board.client.cookies.items()
    await watched.context.add_cookies([{"name": name, "value": value, "url": board.origin}])
    return await watched.page()


async def test_every_page_fits_reads_well_and_breaks_no_rule_of_access(board: Board, chromium: Browser) -> None:
    async with window(chromium, board.origin) as watched:
        page = await opened(watched, board)
        for name, path, waits_for in (
            ("jobs", "/chat/jobs", "Jobs"),
            ("jobs-none", "/chat/jobs?q=nothing+like+it", "Jobs"),
            ("jobs-bulk", "/chat/jobs/bulk?action=retry&status=error", "Try jobs again"),
            ("job", "/chat/jobs/24", "Job 24"),
            ("job-queued", "/chat/jobs/28", "Job 28"),
            ("job-again", "/chat/jobs/4/again", "Run again with changes"),
            ("job-beside", "/chat/jobs/22?beside=24", "Job 22"),
            ("status", "/chat/status", "Status"),
            ("queue", "/chat/queue/", "Queues"),
            ("queue-one", "/chat/queue/queues/llamalith:smollm2", "Queue"),
            ("reference", "/chat/docs", "API"),
            ("reference-open", "/chat/docs#post-api-jobs", "API"),
        ):
            await board.database.write(heartbeat, 1)
            await page.goto(board.origin + path)
            await expect(page.get_by_role("heading", name=waits_for, exact=True, level=1)).to_be_visible()
            await page.wait_for_load_state()
            for width in (1280, 360):
                await page.set_viewport_size({"width": width, "height": 800})
                for scheme in ("light", "dark"):
                    await page.emulate_media(color_scheme=scheme)
                    if is_looked_at_by_axe(width, scheme):
                        assert await violations(page) == [], (name, width, scheme)
                    await photograph(page, f"board-{name}-{scheme}-{width}")
                wider = await page.evaluate(
                    "document.documentElement.scrollWidth - document.documentElement.clientWidth"
                )
                assert wider <= 0, f"{name} at {width} scrolls sideways by {wider} px"


async def visible_rows(page: Page) -> int:
    n_rows: int = await page.evaluate(
        "[...document.querySelectorAll('#rows tr')]"
        ".filter((row) => row.getBoundingClientRect().bottom <= innerHeight).length"
    )
    return n_rows


async def test_a_person_finds_jobs_acts_on_them_and_sees_what_became_of_them(board: Board, chromium: Browser) -> None:
    far_away = {"viewport": {"width": 1280, "height": 800}, "timezone_id": "Pacific/Kiritimati"}
    async with window(chromium, board.origin, **far_away) as watched:
        page = await opened(watched, board)
        await page.goto(f"{board.origin}/chat/jobs")
        assert await visible_rows(page) >= 20
        await page.get_by_text("Days", exact=True).click()
        await expect(page.get_by_label("From (UTC)")).to_be_visible()
        # With the first page the server learns where its reader is.
        await page.get_by_label("From", exact=True).select_option("From the page")
        await page.get_by_role("button", name="Filter").click()
        await expect(page.locator("#of-cancelled")).to_have_text("Cancelled 2")
        await page.get_by_text("Days", exact=True).click()
        await expect(page.get_by_label("From (Pacific/Kiritimati)")).to_be_visible()
        await page.locator("#job-12 a").click()
        await expect(page.locator("#steps")).to_contain_text("The prompt was read in 1.7 s")
        await page.goto(f"{board.origin}/chat/conversations")
        await page.get_by_label("Status").select_option("Failed")
        await page.get_by_role("button", name="Search").click()
        await expect(page.locator(".conversation")).to_have_count(5)
        await page.goto(f"{board.origin}/chat/jobs")
        # Cancelled in place, and the counts follow.
        await expect(page.locator("#of-queued")).to_have_text("Queued 4")
        await page.get_by_role("button", name="Cancel job 30").click()
        await expect(page.locator("#job-30 .badge")).to_have_text("Cancelled")
        await expect(page.locator("#of-queued")).to_have_text("Queued 3")
        # What another hand queues comes by itself.
        await board.database.write(
            lambda connection: submission.submit(connection, prompt("sent since", model="smollm2"), datetime.now(UTC))
        )
        await expect(page.locator("#job-31")).to_be_visible()
        await page.locator("#of-error").click()
        await expect(page.locator("#rows tr")).to_have_count(5)
        await page.get_by_role("searchbox", name="Text or number").fill("21,337 tokens")
        await page.keyboard.press("Enter")
        await expect(page).to_have_url(
            f"{board.origin}/chat/jobs?status=error&q=21%2C337+tokens&model=&priority=&age=&source=&since=&until="
        )
        await expect(page.locator("#rows tr")).to_have_count(3)
        await page.get_by_text("All jobs that match").click()
        await page.get_by_role("link", name="Try those again").click()
        await expect(page.get_by_text("No job matches that this could be done with.")).to_be_visible()
        await page.get_by_role("link", name="Back").click()
        await page.get_by_role("link", name="Change job 4 and run it again").click()
        await page.get_by_label("Prompt", exact=True).fill("Shorter.")
        await page.get_by_label("temperature").fill("0.9")
        await page.get_by_role("button", name="Run it").click()
        await expect(page).to_have_url(f"{board.origin}/chat/jobs/32?beside=4")
        await expect(page.get_by_role("heading", name="Before #4")).to_be_visible()
        await page.get_by_text("Class: interactive").click()
        await page.get_by_role("button", name="Move to batch").click()
        await expect(page.get_by_text("Class: batch")).to_be_visible()


async def test_the_status_page_follows_what_happens_and_keeps_an_open_menu(board: Board, chromium: Browser) -> None:
    async with window(chromium, board.origin, viewport={"width": 1280, "height": 800}) as watched:
        page = await opened(watched, board)
        await page.goto(f"{board.origin}/chat/status")
        waiting = page.locator("#waiting > li")
        await expect(waiting).to_have_count(4)
        await expect(waiting.first).to_have_attribute("id", "waits-29-interactive")
        menu = page.locator("#waits-28-batch details")
        await menu.locator("summary").click()
        async with page.expect_response("**/chat/status/board"):
            pass
        await expect(menu.get_by_role("button", name="Move to interactive")).to_be_visible()
        await menu.get_by_role("button", name="Move to interactive").click()
        await expect(waiting.first).to_have_attribute("id", "waits-28-interactive")
        await page.get_by_role("button", name="Cancel job 26").click()
        await expect(page.locator("#job-26")).to_have_count(0)
        await expect(page.locator("#running")).to_contain_text("smollm2: 3 free places")


async def test_the_reference_opens_where_its_index_leads_and_a_command_is_copied(
    board: Board, chromium: Browser
) -> None:
    permissions = ["clipboard-read", "clipboard-write"]
    async with window(chromium, board.origin, permissions=permissions) as watched:
        page = await opened(watched, board)
        await page.goto(f"{board.origin}/chat/docs")
        await page.get_by_role("navigation", name="Operations").get_by_role("link", name="Change a job").click()
        part = page.locator("#patch-api-jobs-job-id")
        await expect(part).to_be_visible()
        await part.get_by_role("button", name="Copy").click()
        await expect(part.get_by_role("button", name="Copied")).to_be_visible()
        copied: Any = await page.evaluate("navigator.clipboard.readText()")
        assert copied.startswith(f"curl -s -X PATCH {board.origin}/chat/api/jobs/12 ")


async def test_without_javascript_jobs_are_filtered_cancelled_and_moved(board: Board, chromium: Browser) -> None:
    async with window(chromium, board.origin, java_script_enabled=False) as watched:
        page = await opened(watched, board)
        await page.goto(f"{board.origin}/chat/jobs")
        await page.get_by_label("Class").select_option("batch")
        await page.get_by_role("button", name="Filter").click()
        await expect(page.locator("#rows tr")).to_have_count(1)
        await page.get_by_text("All jobs that match").click()
        await page.get_by_role("link", name="class normal").click()
        await page.get_by_role("button", name="Move 1 job").click()
        await expect(page.get_by_text("1 job changed its class.")).to_be_visible()
        await page.goto(f"{board.origin}/chat/jobs?status=queued")
        await page.get_by_text("All jobs that match").click()
        await page.get_by_role("link", name="Cancel those that are open").click()
        await page.get_by_role("button", name="Cancel 4 jobs").click()
        await expect(page.get_by_text("4 jobs were cancelled.")).to_be_visible()
        await expect(page.get_by_text("No job is queued just now.")).to_be_visible()
