"""How much memory the models of a worker may take together, by what the machine and its control groups say."""

from __future__ import annotations

from pathlib import Path

SHARE = 0.8
"""Of the machine's memory, for models; the rest is for web, worker, database and the system."""
MIB = 1024**2


def machine_bytes(root: Path = Path("/")) -> int:
    """SHARE of the machine's memory, or of the limit of this process's control group where that is smaller."""
    total = next(
        int(line.split()[1]) * 1024
        for line in (root / "proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )
    return int(min([total, *_group_limits(root)]) * SHARE)


def _group_limits(root: Path) -> list[int]:
    """In bytes, of the control group and of every one above it, of both versions; none where there is none."""
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
        found += [limit for at in (group, *group.parents) if (limit := _read_limit(mount / at / name))]
    return found


def _read_limit(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
