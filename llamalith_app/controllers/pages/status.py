"""The status page: what runs, what waits, what failed lately, the models and workers, and how the queue fared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, NamedTuple

from litestar import Controller, get, post
from litestar.params import FromPath
from litestar.response import Redirect, Template
from markupsafe import Markup
from sqlalchemy import Connection

from llamalith_app.contracts.forms import ModelForm
from llamalith_app.contracts.jobs import Job
from llamalith_app.controllers.models import ask, engines
from llamalith_app.controllers.pages import EXCERPT_CHARS
from llamalith_app.controllers.pages.redirects import see_other
from llamalith_app.guards.principal import BACKGROUND_PAGE, PAGE
from llamalith_app.jobs import statistics
from llamalith_app.jobs.wishes import WishWord
from llamalith_app.store import workers
from llamalith_app.store.jobs import listing
from llamalith_app.store.jobs import statistics as read
from llamalith_app.store.tables import Priority
from llamalith_app.web import charts
from llamalith_app.web.html import duration, page
from llamalith_app.web.request import AppRequest
from llamalith_app.web.zone import zone_of

MAX_RUNNING = 64
MAX_WAITING = 20
"""Of all that wait; the jobs page has the others."""
MAX_FAILED = 6
MAX_WORKERS = 20
MAX_ENDED = 1000
"""Ended jobs that the charts are made from."""


class StatusPage(Controller):
    path = "/status"
    include_in_schema = False

    @get(opt=PAGE)
    async def status(self, request: AppRequest) -> Template:
        return await _render(request, "status")

    @get("/board", opt=BACKGROUND_PAGE)
    async def board(self, request: AppRequest) -> Template:
        """All that changes on it, for the script that polls it."""
        return await _render(request, "_status")

    @post("/models/{word:str}", opt=PAGE, status_code=303)
    async def ask(self, request: AppRequest, word: FromPath[WishWord]) -> Redirect:
        """Asks the workers to load or unload the model."""
        form = await request.form_as(ModelForm)
        await ask(request, form.model, word)
        return see_other("/chat/status")


class _Reading(NamedTuple):
    running: list[Job]
    waiting: list[Job]
    failed: list[Job]
    classes: list[read.WaitingClass]
    ended: list[read.EndedJob]
    workers: list[workers.WorkerState]


def _read(connection: Connection, owner_id: int, models: Sequence[str], now: datetime) -> _Reading:
    failed = listing.search(connection, owner_id, listing.JobFilter(status="error"), limit=MAX_FAILED).ids
    running = read.running_ids(connection, owner_id, MAX_RUNNING)
    waiting = read.next_ids(connection, owner_id, models, MAX_WAITING)
    jobs = {job.id: job for job in listing.excerpts(connection, owner_id, [*running, *waiting, *failed], EXCERPT_CHARS)}
    return _Reading(
        [jobs[job_id] for job_id in running],
        [jobs[job_id] for job_id in waiting],
        [jobs[job_id] for job_id in failed],
        read.waiting_classes(connection, owner_id, models),
        read.ended_lately(connection, owner_id, now - statistics.SPANS[0], MAX_ENDED),
        workers.not_ended_states(connection, now, MAX_WORKERS),
    )


async def _render(request: AppRequest, template: str) -> Template:
    now = datetime.now(UTC)
    models = await engines(request.parts)
    names = [model.name for model in models]
    # A model that is no longer configured may still have jobs that wait.
    queued = sorted(set((await request.parts.forecasts.board()).queued) - set(names))
    found = await request.parts.database.read(_read, request.principal.user_id, [*names, *queued], now)
    await request.parts.live.add([*found.running, *found.waiting])
    waiting = sorted(found.waiting, key=_start_order)[:MAX_WAITING]
    max_wait = request.parts.max_wait
    return page(
        request,
        template,
        running=found.running,
        free=[(model.name, model.slots - model.slots_used) for model in models if model.state == "loaded"],
        waiting=waiting,
        n_waiting=sum(group.n_jobs for group in found.classes),
        is_many=any(group.n_jobs == read.MAX_COUNTED for group in found.classes),
        failed=found.failed,
        models=models,
        unserved=queued,
        workers=[(worker, max(0, round((now - worker.seen_at).total_seconds()))) for worker in found.workers],
        classes=_by_class(found.classes, max_wait, now),
        throughput=_throughput(found.ended, now, zone_of(request)),
        waits=_waits(found.ended, max_wait),
        priorities=[priority.name.lower() for priority in Priority],
    )


def _start_order(job: Job) -> tuple[float, int, int]:
    """By the forecast where there is one; the jobs of one model come in their order anyway."""
    live = job.progress
    start_s = live.start_eta_s if live is not None else None
    return math.inf if start_s is None else start_s, Priority[job.priority.upper()].value, job.id


class WaitingNow(NamedTuple):
    """The jobs of one class that wait."""

    name: str
    n_jobs: int
    is_more: bool
    age_s: float
    """Of the oldest."""
    max_wait_s: float

    @property
    def is_late(self) -> bool:
        return self.age_s > self.max_wait_s


def _by_class(
    groups: Sequence[read.WaitingClass], max_wait: Mapping[int, timedelta], now: datetime
) -> list[WaitingNow]:
    found = []
    for priority in Priority:
        mine = [group for group in groups if group.priority == priority.value]
        if mine:
            found.append(
                WaitingNow(
                    priority.name.lower(),
                    sum(group.n_jobs for group in mine),
                    any(group.n_jobs == read.MAX_COUNTED for group in mine),
                    max((now - group.oldest_at).total_seconds() for group in mine),
                    max_wait[priority.value].total_seconds(),
                )
            )
    return found


class Chart(NamedTuple):
    drawn: Markup
    rows: list[Any]
    words: str
    """What it shows, in a sentence."""


def _throughput(ended: Sequence[read.EndedJob], now: datetime, zone: tzinfo) -> Chart:
    found = statistics.throughput(ended, is_whole=len(ended) < MAX_ENDED, now=now)
    step_s = found.bucket.total_seconds()
    counts = f"{found.n_done} done and {found.n_failed} failed"
    words = f"{counts} in the last {duration(step_s * len(found.buckets))}, in steps of {duration(step_s)}."
    bars = [
        charts.Bar(
            f"{bucket.start.astimezone(zone):%H:%M %Z}: {bucket.n_done} done, {bucket.n_failed} failed,"
            f" {bucket.n_cancelled} cancelled",
            (("done", bucket.n_done), ("error", bucket.n_failed), ("cancelled", bucket.n_cancelled)),
        )
        for bucket in found.buckets
    ]
    rows = [bucket for bucket in found.buckets if bucket.n_done or bucket.n_failed or bucket.n_cancelled]
    return Chart(charts.bars("throughput", "Jobs that ended", words, bars), rows, words)


def _waits(ended: Sequence[read.EndedJob], max_wait: Mapping[int, timedelta]) -> Chart:
    rows = [
        (Priority(wait.priority).name.lower(), wait, max_wait[wait.priority].total_seconds())
        for wait in statistics.waits(ended)
    ]
    words = "; ".join(
        f"{name}: half within {duration(wait.p50_s)}, 95 % within {duration(wait.p95_s)}, limit {duration(limit_s)}"
        for name, wait, limit_s in rows
    )
    spans = [charts.Span(name, wait.p50_s, wait.p95_s, limit_s) for name, wait, limit_s in rows]
    return Chart(charts.spans("waits", "How long jobs waited for their start", f"{words}.", spans), rows, words)
