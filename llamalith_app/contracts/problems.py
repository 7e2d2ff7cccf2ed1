"""The body of every error answer: RFC 9457 problem details."""

from __future__ import annotations

import msgspec


class Problem(msgspec.Struct, kw_only=True, omit_defaults=True):
    type: str
    """Stable, for programs: `about:llamalith/` and a word such as `bad-input`."""
    title: str
    status: int
    detail: str
    """For people: what is wrong, where, and what is expected."""
    request_id: str
    error: str | None = None
    """In answers to bad input, the same as `detail`: the original had it under this name."""
