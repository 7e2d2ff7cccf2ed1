"""The schedule of faults: what goes wrong, where and when. Pure; the seed alone determines it."""

from __future__ import annotations

import random
from typing import Literal, NamedTuple

Act = Literal["kill", "kill engine", "freeze", "freeze engine", "freeze engine and kill", "drain", "hang up", "flush"]
"""`freeze engine and kill`: a worker's engines are stopped, then it or its `up` is killed. `hang up`: SIGHUP."""

UP = "up"
WEBS = ("web-1", "web-2")
WORKERS = ("worker-1", "worker-2")
REAL_WORKER = "worker-real"
VALKEY = "valkey"
UNDER_UP = {"web-1": "web", "worker-1": "worker", VALKEY: "valkey"}
"""The processes that `up` runs, with its names for them. The others run beside it on the same data."""

PAUSE_S = (0.5, 2.0)
"""Between two faults."""
DOWN_S = (0.0, 1.5)
"""From the death of a process to its restart."""
FROZEN_S = (1.0, 12.0)
OUTLIVED_S = (9.5, 12.0)
"""Half of the freezes outlast the leases, which expire after 9 s without a heartbeat."""

SHARES: dict[Act, int] = {
    "kill": 48,
    "kill engine": 16,
    "freeze": 13,
    "freeze engine": 5,
    "freeze engine and kill": 7,
    "drain": 5,
    "hang up": 2,
    "flush": 4,
}
KILLED = {"web": 28, "worker": 50, "valkey": 15, "up": 7}
FROZEN = {"web": 25, "worker": 55, "valkey": 15, "up": 5}
HUNG = {"worker": 75, "up": 25}
ASKED_TO_END = {"worker": 70, "up": 30}


class Fault(NamedTuple):
    at_s: float
    act: Act
    target: str
    for_s: float
    """How long the target stays down or frozen."""

    def __str__(self) -> str:
        return f"{self.at_s:7.1f} s  {self.act} {self.target}, {self.for_s:.1f} s"


def schedule(seed: int, seconds: float, *, with_real: bool) -> list[Fault]:
    """The faults of so many seconds, in order. `with_real`: there is a worker with the real model."""
    chance = random.Random(seed)
    workers = [*WORKERS, *WORKERS, REAL_WORKER] if with_real else list(WORKERS)
    members = {"web": list(WEBS), "worker": workers, "valkey": [VALKEY], "up": [UP]}
    shares = {
        "kill": KILLED,
        "kill engine": {"worker": 1},
        "freeze": FROZEN,
        "freeze engine": {"worker": 1},
        "freeze engine and kill": HUNG,
        "drain": ASKED_TO_END,
        "hang up": ASKED_TO_END,
        "flush": {"valkey": 1},
    }

    def one_of(shares: dict[str, int]) -> str:
        return chance.choice(members[chance.choices(list(shares), list(shares.values()))[0]])

    found, at_s = [], chance.uniform(*PAUSE_S)
    while at_s < seconds:
        (act,) = chance.choices(list(SHARES), list(SHARES.values()))
        target = one_of(shares[act])
        for_s = chance.choice((FROZEN_S, OUTLIVED_S)) if act in ("freeze", "freeze engine") else DOWN_S
        found.append(Fault(at_s, act, target, chance.uniform(*for_s)))
        at_s += chance.uniform(*PAUSE_S)
    return found
