"""Types of text that clients send, with their limits."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

MAX_TEXT = 1_000_000
"""Characters (code points) of a prompt, a system prompt or a context."""
MAX_NAME = 200
"""Of a name, or of a conversation's id."""

END = r"(?![\s\S])"
"""Of a pattern that clients read too: JavaScript has no other, and $ lets a line break through in Python."""
NUL_FREE = rf"^[^\x00]*{END}"
CONTROL_FREE = rf"^[^\x00-\x1f\x7f-\x9f]*{END}"
NOT_BLANK = r"^(?=[\s\S]*\S)"
"""Before one of the patterns above."""

Text = Annotated[
    str,
    Meta(
        max_length=MAX_TEXT,
        pattern=NUL_FREE,
        description="At most 1,000,000 characters, without NUL.",
    ),
]
RequiredText = Annotated[
    Text,
    Meta(
        description="1 to 1,000,000 characters that are not all blank, without NUL.",
        extra_json_schema={"minLength": 1, "allOf": [{"pattern": r"\S"}]},
    ),
]
"""Whoever takes it looks itself whether it is blank, to say so in better words than a pattern's."""
ConversationId = Annotated[
    str,
    Meta(
        max_length=MAX_NAME,
        pattern=CONTROL_FREE,
        description="1 to 200 characters without control characters; blanks before and after them do not count.",
    ),
]
NumberAsId = Annotated[
    int, Meta(ge=-(2**63), le=2**63 - 1, description="A whole number, as chat platforms have them: taken as its text.")
]
Name = Annotated[str, Meta(max_length=MAX_NAME, pattern=CONTROL_FREE, description="A name of the configuration.")]


def id_text(given: str | int | None) -> str:
    """A conversation's id as it is stored; empty: none was given."""
    return "" if given is None else str(given).strip()
