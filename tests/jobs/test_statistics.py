"""What ended jobs say, what happened to one, and the charts and commands made of it: pure functions."""

from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime, timedelta
from typing import Any
from xml.etree import ElementTree as ET

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamalith_app.contracts import examples
from llamalith_app.contracts.jobs import Attempt, Job
from llamalith_app.jobs import statistics, timeline
from llamalith_app.store.jobs.statistics import EndedJob
from llamalith_app.web import charts, curl

NOW = datetime(2026, 11, 30, 12, 7, tzinfo=UTC)


def job_that_ended(
    ago_s: float, status: str = "done", waited_s: float | None = 1.0, priority: int = 1, token_s: float | None = None
) -> EndedJob:
    ended = NOW - timedelta(seconds=ago_s)
    created = ended - timedelta(seconds=100)
    started = None if waited_s is None else created + timedelta(seconds=waited_s)
    return EndedJob(
        priority, status, created, started, ended, None if token_s is None else created + timedelta(seconds=token_s)
    )


def test_each_ended_job_is_counted_once_in_the_time_that_the_rows_cover() -> None:
    rows = [job_that_ended(10), job_that_ended(20, "error"), job_that_ended(3000, "cancelled")]
    whole = statistics.throughput(rows, is_whole=True, now=NOW)
    assert whole.bucket == timedelta(hours=1)
    assert (whole.n_done, whole.n_failed, sum(bucket.n_cancelled for bucket in whole.buckets)) == (1, 1, 1)
    assert whole.buckets[-1].start == NOW.replace(minute=0), "at a round time"
    part = statistics.throughput(rows, is_whole=False, now=NOW)
    assert part.bucket * statistics.N_BUCKETS == timedelta(minutes=10), "the longest that they cover"
    assert (part.n_done, part.n_failed) == (1, 1)
    assert statistics.throughput([], is_whole=True, now=NOW).n_done == 0


def test_waits_are_of_jobs_that_were_started_and_never_negative() -> None:
    rows = [job_that_ended(1, waited_s=n) for n in range(1, 21)]
    rows += [job_that_ended(1, "error", None), job_that_ended(1, waited_s=-5, priority=0)]
    interactive, normal = statistics.waits(rows)
    assert (interactive.priority, interactive.p50_s, interactive.p95_s) == (0, 0.0, 0.0)
    assert (normal.n_jobs, normal.p50_s, normal.p95_s) == (20, 10.0, 19.0)
    assert interactive.token_p50_s is normal.token_p50_s is None, "nobody knows"
    (known,) = statistics.waits([*rows[:20], job_that_ended(1, token_s=7), job_that_ended(1, token_s=-1)])
    assert (known.n_jobs, known.token_p50_s) == (22, 0.0)


@given(st.lists(st.floats(0, 1e6), min_size=1).map(sorted), st.floats(1, 100))
def test_a_percentile_is_a_value_that_so_many_do_not_exceed(values: list[float], percent: float) -> None:
    found = statistics.percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) >= len(values) * percent / 100 - 1e-6


# The timeline


def job(**fields: Any) -> Job:
    (example,) = [one for one in examples._ALL if type(one) is Job and one.status == "done"]
    return msgspec.structs.replace(example, created_at=NOW, **fields)


def attempt(number: int, start_s: float, end_s: float | None, outcome: Any = None) -> Attempt:
    ended = None if end_s is None else NOW + timedelta(seconds=end_s)
    return Attempt(
        attempt=number,
        worker_id=1,
        started_at=NOW + timedelta(seconds=start_s),
        ended_at=ended,
        outcome=outcome,
        kind=None,
        reason=None,
    )


@pytest.mark.parametrize(
    ("status", "attempts", "expected"),
    [
        ("queued", [], [("waited", None)]),
        ("cancelled", [], [("waited", 9.0)]),
        ("processing", [attempt(1, 2, None)], [("waited", 2.0), ("attempt", None)]),
        ("queued", [attempt(1, 2, 3, "lost")], [("waited", 2.0), ("attempt", 1.0), ("waited", None)]),
        (
            "done",
            [attempt(1, 2, 3, "failed"), attempt(2, 5, 9, "done")],
            [("waited", 2.0), ("attempt", 1.0), ("waited", 2.0), ("attempt", 4.0)],
        ),
    ],
)
def test_waits_and_attempts_come_in_turn(
    status: Any, attempts: list[Attempt], expected: list[tuple[str, float | None]]
) -> None:
    ended = NOW + timedelta(seconds=9) if status in ("done", "cancelled") else None
    steps = timeline.steps(job(status=status, processed_at=ended), attempts)
    later = NOW + timedelta(seconds=100)
    assert [(step.kind, None if step.ended_at is None else step.seconds(later)) for step in steps] == expected
    assert all(step.seconds(NOW - timedelta(hours=1)) >= 0 for step in steps), "a clock that was set back"


def test_an_attempt_is_told_in_phases_as_far_as_they_are_known() -> None:
    def phases(end_s: float | None, outcome: Any, *after_s: float) -> list[tuple[str, float, bool]]:
        names = ("loaded_at", "prompt_read_at", "first_token_at")
        times = {name: NOW + timedelta(seconds=s) for name, s in zip(names, after_s, strict=False)}
        one = msgspec.structs.replace(attempt(1, 0, end_s, outcome), **times)
        (step,) = [step for step in timeline.steps(job(status="processing"), [one]) if step.attempt]
        return [(phase.kind, phase.seconds, phase.is_over) for phase in step.phases]

    whole = [("loading", 1.0, True), ("reading", 2.0, True), ("starting", 0.0, True)]
    assert phases(9, "done", 1, 3, 3) == [*whole, ("writing", 6.0, True)]
    assert phases(9, "cancelled", 1, 3, 3) == [*whole, ("writing", 6.0, False)]
    assert phases(9, "lost", 1, 3) == [*whole[:2], ("starting", 6.0, False)]
    assert phases(9, "failed", 1) == [*whole[:1], ("reading", 8.0, False)]
    assert phases(None, None, 1, 3) == whole[:2], "what goes on is not told: it may be over already"
    assert phases(9, "done") == phases(9, "failed") == phases(None, None) == []
    assert phases(9, "done", 1, 0.5, 3)[1] == ("reading", 0.0, True), "a clock that was set back"


# Charts


NUMBERS = st.floats(0, 1e9)


@given(st.lists(st.tuples(st.text(), NUMBERS, NUMBERS, NUMBERS | st.none()), max_size=5))
def test_a_chart_is_whole_markup_within_its_box_whatever_its_numbers_and_labels(rows: list[Any]) -> None:
    printable = [("".join(filter(str.isprintable, label)), *rest) for label, *rest in rows]
    drawn = [
        charts.bars("a", "<t>", "&d", [charts.Bar(label, (("done", x), ("error", y))) for label, x, y, _ in printable]),
        charts.spans(
            "b", "<t>", "&d", [charts.Span(label, min(x, y), max(x, y), most) for label, x, y, most in printable]
        ),
        charts.strip("c", "<t>", "&d", [charts.Piece("waited", x, label) for label, x, _, _ in printable]),
    ]
    for one in drawn:
        root = ET.fromstring(one)
        assert (root[0].text, root[1].text) == ("<t>", "&d")
        _, _, width, _ = map(float, root.attrib["viewBox"].split())
        for rect in root.iter("rect"):
            assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width + 1


# Commands


@given(st.text(), st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3))
def test_a_command_sends_exactly_its_body(content: str, more: dict[str, str]) -> None:
    content = content.encode(errors="ignore").decode()
    body = {
        "content": content,
        "more": {k.encode(errors="ignore").decode(): v.encode(errors="ignore").decode() for k, v in more.items()},
    }
    command = curl.command("POST", "http://h/x?a='b'", body)
    words = shlex.split(command.replace("\\\n", ""))
    assert words[2] == "http://h/x?a='b'"
    assert json.loads(words[words.index("-d") + 1]) == body
    assert command.count("\n") == 3, "a line for each option"
    assert not any(char in command for char in "\x1b\u202e\u200b\x07")


def test_a_command_says_only_what_curl_does_not_by_itself() -> None:
    assert curl.command("GET", "http://h/").startswith("curl -s http://h/ ")
    assert curl.command("DELETE", "http://h/").startswith("curl -s -X DELETE http://h/ ")
    assert curl.command("POST", "http://h/").startswith("curl -s -X POST http://h/ ")
    assert curl.command("GET", "http://h/", is_stream=True).startswith("curl -sN ")
    assert curl.command("POST", "http://h/", file="f.json").endswith("-d @f.json")
