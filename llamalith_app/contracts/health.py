"""The answers of the health and readiness probes."""

from __future__ import annotations

from typing import Literal

import msgspec


class Health(msgspec.Struct, kw_only=True):
    status: Literal["ok"] = "ok"


class Readiness(msgspec.Struct, kw_only=True):
    """`ok`, or what is wrong with this part."""

    ready: bool
    database: str
    redis: str
    worker: str
