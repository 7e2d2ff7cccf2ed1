"""How much memory the models of a worker may take together, how much one needs, and how many slots that leaves it.

Reads the machine and, by `engine/gguf.py`, headers of model files. Estimates only: nothing here is enforced by the
system. What a GPU holds counts as if it were the machine's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from llamalith_app.engine import gguf
from llamalith_app.settings.config import ModelConfig

SHARE = 0.8
"""Of the machine's memory, for models; the rest is for web, worker, database and the system."""
OVERHEAD_BYTES = 150 * 1024**2
"""An engine's own: Python, libraries and buffers. SmolLM2-135M takes 80 MiB of it; wider models have wider buffers."""
MIN_SLOTS, MAX_SLOTS = 2, 8
"""Bounds of the default, before memory is looked at."""
MIB = 1024**2


class Plan(NamedTuple):
    """How a model is loaded. Both numbers are estimates of a file that is judged again when it is loaded."""

    n_slots: int
    need_bytes: int
    """0: its file cannot be read, so that nothing is known."""
    flaw: str = ""
    """Why its load will fail all the same, as far as headers tell; empty: nothing is known."""


def machine_bytes(root: Path = Path("/")) -> int:
    """SHARE of the machine's memory, or of the limit of this process's control group where that is smaller."""
    total = next(
        int(line.split()[1]) * 1024
        for line in (root / "proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )
    return int(min([total, *_limits(root)]) * SHARE)


def _limits(root: Path) -> list[int]:
    """Those of the control group and of every one above it, of both versions; none where there is none."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container the path may be the host's, of which only the mount's root is seen here.
        group = Path(path.lstrip("/"))
        found += [limit for at in (group, *group.parents) if (limit := _limit(mount / at / name))]
    return found


def _limit(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def plan(model: ModelConfig, worker_count: int | None, budget_bytes: int) -> Plan:
    """Raises BadGguf. A file that cannot be read at all is the engine's to tell of, and needs nothing."""
    settings = model.settings
    wanted = settings.n_slots or worker_count
    most = min(MAX_SLOTS, max(MIN_SLOTS, 2 * len(os.sched_getaffinity(0))))
    try:
        header = gguf.read(model.path)
    except OSError:
        return Plan(wanted or most, 0)
    each = header.sequence_bytes(settings.n_ctx)
    free_bytes = budget_bytes - header.file_bytes - OVERHEAD_BYTES
    n_slots = wanted or max(1, min(most, min(budget_bytes // 2, free_bytes) // max(1, each)))
    return Plan(n_slots, header.file_bytes + n_slots * each + OVERHEAD_BYTES, header.flaw)
