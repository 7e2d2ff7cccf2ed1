"""Who asks for something: what every door hands on to the queue."""

from __future__ import annotations

from typing import Literal

import msgspec


class Principal(msgspec.Struct, frozen=True):
    """Whose rows a request may see and write."""

    user_id: int
    door: Literal["token", "session"]
    csrf_token: str = ""
    """What the forms of this session carry; empty behind a token."""
