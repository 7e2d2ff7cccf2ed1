"""What a page's script learns of a file that it sent: the text in it."""

from __future__ import annotations

import msgspec


class Attachment(msgspec.Struct, kw_only=True):
    name: str
    """As it can be shown: without a path, and with marks for what is invisible."""
    text: str
    pages: int | None
    """Of the whole file; None: it has no pages."""
    truncated: bool
    """Whether the file has more text than this."""
    note: str
    """What is missing from the text, for people; empty: nothing."""
