"""What every error answer carries: RFC 9457 problem details."""

from __future__ import annotations

import msgspec


class Problem(msgspec.Struct, kw_only=True, omit_defaults=True):
    type: str
    """Stable, for programs: `about:llamalith/` and a word such as `bad-input`."""
    title: str
    status: int
    detail: str
    """For people: what was wrong, where, and what would be right."""
    request_id: str
    error: str | None = None
    """The detail once more in answers to bad input, where the original had it."""
