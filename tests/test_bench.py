"""`make bench`'s pieces: that they are there, what they ask, and the table that they print. No test times anything."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path

import httpx
import pytest

from bench import client, prompts, soak, stored, table
from llamalith_app.store import check
from llamalith_app.store.database import write_engine

BENCH = Path(__file__).parents[1] / "bench"
OF_ANOTHER_PLACE = ("bare_loop", "picture")
"""Programs of their own: one where matplotlib is, one for llama_cpp, which is for engines' processes alone."""


@pytest.mark.parametrize("path", sorted(BENCH.glob("*.py")), ids=lambda path: path.stem)
def test_every_piece_can_be_imported_and_says_what_it_measures(path: Path) -> None:
    if path.stem in OF_ANOTHER_PLACE:
        assert ast.get_docstring(ast.parse(path.read_text()))
    else:
        assert importlib.import_module(f"bench.{path.stem}").__doc__


async def test_contenders_take_turns() -> None:
    order: list[str] = []

    async def one(pair: int) -> int:
        order.append(f"a{pair}")
        return pair

    async def other(pair: int) -> int:
        order.append(f"b{pair}")
        return -pair

    assert await table.alternate(3, {"one": one, "other": other}) == {"one": [0, 1, 2], "other": [0, -1, -2]}
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_a_rate_is_compared_by_medians_with_the_highest_as_the_best() -> None:
    row = table.compared("P1", "rate", [100, 80, 90], [180, 90, 99], unit="tok/s", better="more", goal=1.1)
    assert row[2:] == ("90 (100) tok/s", "99 (180) tok/s", "1.10 (1.80)", "≥ 1.1", True)


def test_a_time_is_compared_by_medians_with_the_lowest_as_the_best() -> None:
    row = table.compared("P4", "time", [10, 20, 30], [30, 25, 5], unit="ms", better="less", goal=1.1)
    assert row[2:] == ("20 (10) ms", "25 (5) ms", "1.25 (0.50)", "≤ 1.1", False)


def test_the_table_says_where_a_goal_is_missed() -> None:
    rows = [
        table.Row("P6", "start", "", "p50 9 ms", "", "≤ 5 ms", False),
        table.Row("", "other", "", "3", "", "", None),
    ]
    assert table.render(rows).splitlines()[2:] == [
        "| P6 | start |  | p50 9 ms |  | ≤ 5 ms | **no** |",
        "|  | other |  | 3 |  |  |  |",
    ]


def test_no_two_series_begin_alike_and_each_is_the_same_in_every_run() -> None:
    first, second = (prompts.history(series)[0].content.split() for series in ("a", "b"))
    assert first[3:30] != second[3:30]
    assert prompts.short("a", 8) == prompts.short("a", 8)
    assert len({one[0].content for one in prompts.short("a", 32)}) == 32


async def test_the_client_reads_events_of_both_kinds() -> None:
    body = (
        'retry: 1000\n\nevent: delta\ndata: {"text": "a"}\n\n: keep-alive\n\ndata: {"choices": []}\n\ndata: [DONE]\n\n'
    )
    answer = httpx.Response(200, content=body, request=httpx.Request("GET", "http://h/"))
    assert [event async for event in client.events(answer)] == [("delta", {"text": "a"}), ("", {"choices": []})]


async def test_at_once_counts_the_tokens_that_were_written() -> None:
    asked: list[str] = []

    class Server:
        async def ask(self, messages: object, max_tokens: int) -> client.Answer:
            asked.append(json.dumps(messages))
            return client.Answer("", 1, max_tokens - 1, 0.5, 1.0)

    seen = await client.at_once(Server(), prompts.short("a", 5), 2, 4)
    assert len(set(asked)) == 5
    assert seen.first_s == [0.5] * 5
    assert seen.tokens_a_second > 0


@pytest.mark.parametrize(
    "shape",
    [stored.Shape(10, 1), stored.Shape(4, 5), stored.Shape(1, 20, is_blocked=True, is_mixed=False)],
    ids=str,
)
def test_what_is_written_in_bulk_is_what_the_record_allows(tmp_path: Path, shape: stored.Shape) -> None:
    path = tmp_path / "record.db"
    stored.build(path, 100, 20, [("of its own", "a reply")] if shape.is_blocked else [])
    stored.let_wait(path, shape)
    engine = write_engine(path)
    with engine.connect() as connection:
        counted = check.row_counts(connection)
        assert counted["jobs done"] == 100
        assert counted["jobs queued"] == shape.n_conversations * shape.n_each
        assert check.violations(connection) == []
    stored.let_nothing_wait(path)
    with engine.connect() as connection:
        assert check.row_counts(connection)["jobs"] == 100
        assert check.violations(connection) == []
    engine.dispose()


def test_a_line_says_what_rises_by_how_much_an_hour_and_how_sure_that_is() -> None:
    straight = soak.line([(10.0 * n, 5 + n / 360) for n in range(20)])
    assert straight.an_hour == pytest.approx(1.0)
    assert straight.margin == pytest.approx(0.0, abs=1e-6)
    wavering = soak.line([(10.0 * n, 5 + n % 2) for n in range(20)])
    assert abs(wavering.an_hour) < wavering.margin


def test_a_soak_misses_its_goal_where_memory_grows_after_the_warm_up() -> None:
    def sampled(n: int, mib: float) -> soak.Sample:
        wal = {("SQLite", "MiB of WAL"): 4.0}
        return soak.Sample(10.0 * n, {"web": 1}, {("web", "MiB"): mib, ("web", "threads"): 9.0} | wal)

    warms_up = [sampled(n, min(n, 10)) for n in range(40)]
    assert [row.is_met for row in soak.rows(warms_up, 100)] == [True, True, True]
    grows = [sampled(n, 10 + n / 100) for n in range(40)]
    assert [row.is_met for row in soak.rows(grows, 100)] == [False, True, True]


def test_a_soak_notices_a_part_that_was_started_again() -> None:
    samples = [soak.Sample(n, {"web": 1, "worker": 2 + n // 5}, {}) for n in range(10)]
    assert soak.restarts(samples) == ["worker"]
