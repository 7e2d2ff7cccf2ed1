"""What goes wrong and when: a schedule that follows from the seed alone. Pure."""

from __future__ import annotations

import random
from typing import Literal, NamedTuple

Act = Literal["kill", "kill engine", "freeze", "drain", "flush"]

WEBS = ("web-1", "web-2")
WORKERS = ("worker-1", "worker-2")
REAL_WORKER = "worker-real"
VALKEY = "valkey"

PAUSE_S = (0.5, 2.0)
"""Between two faults."""
DOWN_S = (0.0, 1.5)
"""From the death of a part to its restart."""
FROZEN_S = (1.0, 12.0)
OUTLIVED_S = (9.5, 12.0)
"""Every other freeze lasts so long that leases are taken away meanwhile: they live 9 s without a beat."""

SHARES: dict[Act, int] = {"kill": 55, "kill engine": 20, "freeze": 15, "drain": 6, "flush": 4}
KILLED = {"web": 30, "worker": 55, "valkey": 15}
FROZEN = {"web": 25, "worker": 60, "valkey": 15}


class Fault(NamedTuple):
    at_s: float
    act: Act
    target: str
    for_s: float
    """How long it stays down or frozen."""

    def __str__(self) -> str:
        return f"{self.at_s:7.1f} s  {self.act} {self.target}, {self.for_s:.1f} s"


def schedule(seed: int, seconds: float, *, with_real: bool) -> list[Fault]:
    chance = random.Random(seed)
    workers = [*WORKERS, *WORKERS, REAL_WORKER] if with_real else list(WORKERS)
    members = {"web": list(WEBS), "worker": workers, "valkey": [VALKEY]}

    def one_of(shares: dict[str, int]) -> str:
        return chance.choice(members[chance.choices(list(shares), list(shares.values()))[0]])

    found, at_s = [], chance.uniform(*PAUSE_S)
    while at_s < seconds:
        (act,) = chance.choices(list(SHARES), list(SHARES.values()))
        target = VALKEY
        if act in ("kill", "freeze"):
            target = one_of(KILLED if act == "kill" else FROZEN)
        elif act in ("kill engine", "drain"):
            target = chance.choice(workers)
        for_s = chance.choice((FROZEN_S, OUTLIVED_S)) if act == "freeze" else DOWN_S
        found.append(Fault(at_s, act, target, chance.uniform(*for_s)))
        at_s += chance.uniform(*PAUSE_S)
    return found
