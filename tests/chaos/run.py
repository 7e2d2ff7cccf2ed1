"""One run: the product under load while its processes are killed and frozen, then the check of every promise."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from tests.chaos import record
from tests.chaos.checker import Violation, check, max_concurrent_attempts
from tests.chaos.cluster import FAKE_MODELS, REAL_MODEL, TOKEN, Cluster, kills
from tests.chaos.faults import schedule
from tests.chaos.history import History
from tests.chaos.load import Load
from tests.chaos.record import Record

STUCK_S = 120.0
"""Once everything runs again, jobs must end at least this often until none is open. Longer than the longest backoff."""
ANSWER_S = 60.0
"""Once everything runs again, every request must be answered within this time, and every stream end within this time
after all jobs."""
ASKED_AGAIN = 100


class Result(NamedTuple):
    violations: list[Violation]
    report: str


async def run(folder: Path, *, seed: int, seconds: float, real_share: float) -> Result:
    history = History()
    cluster = Cluster(folder, with_real=real_share > 0)
    faults = schedule(seed, seconds, with_real=real_share > 0)
    (folder / "schedule.txt").write_text("".join(f"{fault}\n" for fault in faults))
    cluster.data_dir.mkdir()
    code, output = await cluster.run_command("migrate")
    assert code == 0, output
    record.keep_journal(cluster.database)
    load = Load(
        history,
        list(cluster.ports.values()),
        TOKEN,
        seed=seed,
        fake_models=FAKE_MODELS,
        real_model=REAL_MODEL if real_share > 0 else None,
        real_share=real_share,
    )
    try:
        await cluster.start()
        load.start()
        started = time.monotonic()
        for fault in faults:
            await asyncio.sleep(max(0.0, started + fault.at_s - time.monotonic()))
            done = cluster.do(fault)
            print(fault if done else f"{fault} (nobody there)", flush=True)
        await asyncio.sleep(max(0.0, started + seconds - time.monotonic()))
        print("faults stop", flush=True)
        await cluster.calm()
        quiet_from = time.monotonic()
        await load.stop(ANSWER_S)
        n_open = await _until_all_ended(cluster)
        print(f"everything runs; {n_open} jobs are open {time.monotonic() - quiet_from:.1f} s later", flush=True)
        await load.ask_again(ASKED_AGAIN)
        await load.end(ANSWER_S)
        shown = await _read_all(cluster)
    finally:
        await cluster.stop()
        history.write(folder / "history.json")
    code, checked = await cluster.run_command("check")
    found = record.read(cluster.database)
    violations = check(history, found, fake_models=frozenset(FAKE_MODELS))
    violations += [Violation("What the API shows is what is stored", what) for what in _differences(shown, found)]
    violations += [Violation("No process ends by itself", what) for what in cluster.unexpected]
    violations += [Violation("Every process ends with the product", what) for what in cluster.leftovers()]
    violations += [Violation("Nothing unexpected happens in any process", what) for what in cluster.complaints()]
    if code != 0:
        violations.append(Violation("`llamalith check` finds nothing", checked))
    report = _report(seed, seconds, cluster, history, found)
    n_kills = kills(cluster.counts)
    if n_kills and not violations:
        report += f"\n{n_kills} kills broke no promise: at most {3 / n_kills:.2%} of kills do, at 95 % confidence"
    return Result(violations, report)


async def _until_all_ended(cluster: Cluster) -> int:
    """Waits as long as jobs go on ending; returns how many have not ended."""
    n_open, since = record.n_open(cluster.database), time.monotonic()
    while n_open and time.monotonic() - since < STUCK_S:
        await asyncio.sleep(0.2)
        if (n_left := record.n_open(cluster.database)) != n_open:
            n_open, since = n_left, time.monotonic()
    return n_open


async def _read_all(cluster: Cluster) -> tuple[dict[int, Any], dict[str, list[dict[str, str]]]]:
    """Every job and every conversation as the API shows them."""
    jobs: dict[int, Any] = {}
    messages: dict[str, list[dict[str, str]]] = {}
    port = next(iter(cluster.ports.values()))
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}/api",
        headers={"Authorization": f"Bearer {TOKEN}"},
        timeout=30,
        trust_env=False,
    ) as api:
        before = 2**62
        while page := (await api.get("/jobs", params={"limit": 500, "before": before})).json()["jobs"]:
            jobs |= {job["id"]: job for job in page}
            before = page[-1]["id"]
        for conversation_id in dict.fromkeys(job["conversation_id"] for job in jobs.values()):
            answer = await api.get(f"/conversations/{conversation_id}/messages")
            messages[conversation_id] = answer.json()["messages"]
    return jobs, messages


def _differences(shown: tuple[dict[int, Any], dict[str, list[dict[str, str]]]], found: Record) -> list[str]:
    jobs, messages = shown
    replies = {message.job_id: message.content for message in found.messages if message.role == "assistant"}
    stored_jobs = {
        job.id: (job.public_id, job.content, job.status, job.error if job.status == "error" else replies.get(job.id))
        for job in found.jobs.values()
    }
    shown_jobs = {
        job["id"]: (job["conversation_id"], job["user_input"], job["status"], job["result"]) for job in jobs.values()
    }
    public_ids = {job.conversation: job.public_id for job in found.jobs.values()}
    stored_messages: dict[str, list[dict[str, str]]] = {public_id: [] for public_id in public_ids.values()}
    for message in found.messages:
        stored_messages[public_ids[message.conversation]].append({"role": message.role, "content": message.content})
    return [
        *_unequal("job", shown_jobs, stored_jobs),
        *_unequal("conversation", messages, stored_messages),
    ]


def _unequal(name: str, shown: Mapping[Any, Any], stored: Mapping[Any, Any]) -> list[str]:
    return [
        f"{name} {key}: shown {shown.get(key)}, stored {stored.get(key)}"
        for key in shown.keys() | stored.keys()
        if shown.get(key) != stored.get(key)
    ]


def _report(seed: int, seconds: float, cluster: Cluster, history: History, found: Record) -> str:
    ends = Counter(
        job.status if job.status != "error" else f"error of kind {job.error_kind}" for job in found.jobs.values()
    )
    outcomes = Counter(f"{one.kind} {one.outcome}" for one in history.operations)
    attempts = Counter(attempt.outcome or "open" for attempt in found.attempts)
    complete = [heard for heard in history.heard if heard.final]
    lines = [
        f"seed {seed}, {seconds:g} s",
        f"faults      {_counted(cluster.counts)}",
        f"jobs        {len(found.jobs)}: {_counted(ends)}; {max_concurrent_attempts(found)} at once at the most",
        f"by model    {_counted(Counter(job.model for job in found.jobs.values()))}",
        f"attempts    {len(found.attempts)}: {_counted(attempts)}",
        f"operations  {len(history.operations)}: {_counted(outcomes)}",
        f"            asked again without an answer {sum(one.n_unanswered for one in history.operations)},"
        f" told to come again {sum(one.n_busy for one in history.operations)}",
        f"streams     {len(complete)} heard to their end over {sum(one.n_connections for one in complete)} connections,"
        f" with {sum(one.n_restarts for one in complete)} restarts",
        f"ends seen   {len(history.sightings)}",
    ]
    return "\n".join(lines)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
