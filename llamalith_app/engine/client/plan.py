"""How much memory a model file needs when it is loaded here, and how many slots the budget leaves it.

Reads the header of the file (`engine/gguf.py`). Estimates only: nothing here is enforced by the system. What a GPU
holds counts as if it were the machine's.
"""

from __future__ import annotations

import os
from pathlib import Path

from llamalith_app.engine import gguf
from llamalith_app.engine.client.protocol import LoadPlan
from llamalith_app.settings.declaration import ModelSettings

OVERHEAD_BYTES = 150 * 1024**2
"""An engine's own: Python, libraries and buffers. SmolLM2-135M takes 80 MiB of it; wider models have wider buffers."""
MIN_SLOTS, MAX_SLOTS = 2, 8
"""Bounds of the default, before memory is looked at."""


def plan_file(path: Path, settings: ModelSettings, default_n_slots: int | None, budget_bytes: int) -> LoadPlan:
    """Slots by the model's settings, else `default_n_slots`, else by cores and memory.

    Raises BadGguf. A file that cannot be read at all needs 0 bytes: the engine reports it when it loads it.
    """
    wanted = settings.n_slots or default_n_slots
    most = min(MAX_SLOTS, max(MIN_SLOTS, 2 * len(os.sched_getaffinity(0))))
    try:
        header = gguf.read(path)
    except OSError:
        return LoadPlan(wanted or most, 0)
    slot_bytes = header.sequence_bytes(settings.n_ctx)
    free_bytes = budget_bytes - header.file_bytes - OVERHEAD_BYTES
    n_slots = wanted or max(1, min(most, min(budget_bytes // 2, free_bytes) // max(1, slot_bytes)))
    return LoadPlan(n_slots, header.file_bytes + n_slots * slot_bytes + OVERHEAD_BYTES, header.flaw)
