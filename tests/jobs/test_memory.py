"""The memory that models may take, from what the machine says; and the slots that it leaves them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llamalith_app.engine.client.plan import OVERHEAD_BYTES, plan_file
from llamalith_app.engine.client.protocol import LoadPlan
from llamalith_app.jobs.worker import memory
from llamalith_app.jobs.worker.memory import MIB
from llamalith_app.settings.declaration import ModelSettings
from tests.gguf import LLAMA, write

GROUP = "sys/fs/cgroup"


def machine(root: Path, cgroup: str, **limits: str) -> Path:
    """1000 MiB, and control groups with these limits by file."""
    files = {"proc/meminfo": f"MemFree: 1 kB\nMemTotal: {1000 * 1024} kB\n", "proc/self/cgroup": cgroup, **limits}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize(
    ("cgroup", "limits", "mib"),
    [
        ("0::/\n", {}, 800),
        ("0::/a/b\n", {f"{GROUP}/a/b/memory.max": "max\n", f"{GROUP}/a/memory.max": f"{500 * MIB}\n"}, 400),
        ("0::/a\n", {f"{GROUP}/a/memory.max": f"{2000 * MIB}"}, 800),
        ("0::/of/the/host\n", {f"{GROUP}/memory.max": f"{100 * MIB}"}, 80),
        ("3:cpu:/x\n2:memory:/x\n", {f"{GROUP}/memory/x/memory.limit_in_bytes": f"{200 * MIB}"}, 160),
        ("2:memory:/of/the/host\n", {f"{GROUP}/memory/memory.limit_in_bytes": f"{300 * MIB}"}, 240),
        ("2:memory:/x\n", {f"{GROUP}/memory/x/memory.limit_in_bytes": "9223372036854771712"}, 800),
    ],
)
def test_a_container_s_limit_counts_where_it_is_smaller(
    tmp_path: Path, cgroup: str, limits: dict[str, str], mib: int
) -> None:
    assert memory.machine_bytes(machine(tmp_path, cgroup, **limits)) == mib * MIB


def test_this_machine_has_memory() -> None:
    assert memory.machine_bytes() > 100 * MIB


def plan(path: Path, default_n_slots: int | None, budget_bytes: int, *, n_slots: int | None = None) -> LoadPlan:
    return plan_file(path, ModelSettings(n_ctx=1024, n_slots=n_slots), default_n_slots, budget_bytes)


def test_slots_are_the_model_s_own_else_the_worker_s_else_by_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.gguf")
    assert plan(path, 5, 2**40, n_slots=3).n_slots == 3
    assert plan(path, 5, 2**40).n_slots == 5
    for n_cores, n_slots in ((1, 2), (3, 6), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=n_cores: set(range(n)))
        assert plan(path, None, 2**40).n_slots == n_slots


def test_the_caches_of_all_slots_take_at_most_half_of_the_budget_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    path = write(tmp_path / "m.gguf", LLAMA | {"llama.attention.head_count_kv": 4096})
    each = 1024 * 2 * 4096 * 32 * 2
    assert plan(path, None, 10 * each).n_slots == 5
    assert plan(path, None, each).n_slots == 1


def test_by_default_there_are_no_more_slots_than_fit_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    path = write(tmp_path / "m.gguf", LLAMA | {"llama.attention.head_count_kv": 4096}, file_bytes=1000 * MIB)
    each = 1024 * 2 * 4096 * 32 * 2
    budget = 1000 * MIB + OVERHEAD_BYTES + 2 * each
    assert budget // 2 > 2 * each
    planned = plan(path, None, budget)
    assert planned == LoadPlan(2, budget)


def test_a_need_is_the_file_the_caches_and_the_engine_s_own(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", file_bytes=50 * MIB)
    few, many = (plan(path, None, 2**40, n_slots=n).need_bytes for n in (1, 11))
    assert few == 50 * MIB + OVERHEAD_BYTES + 1024 * 256
    assert many - few == 10 * 1024 * 256


def test_of_an_absent_file_nothing_is_known(tmp_path: Path) -> None:
    assert plan(tmp_path / "absent", None, 2**40, n_slots=2) == LoadPlan(2, 0)
