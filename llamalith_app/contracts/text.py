"""Types of text that clients send, with their limits."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

MAX_TEXT = 1_000_000
"""Characters (code points) of a prompt, a system prompt or a context."""
MAX_NAME = 200
"""Characters of a name or a conversation's id."""

END = r"(?![\s\S])"
"""The end of a pattern, in Python and in JavaScript alike: Python's $ also matches before a last line break."""
NUL_FREE = rf"^[^\x00]*{END}"
CONTROL_FREE = rf"^[^\x00-\x1f\x7f-\x9f]*{END}"
NOT_BLANK = r"^(?=[\s\S]*\S)"
"""Goes before one of the patterns above."""

Text = Annotated[
    str,
    Meta(
        max_length=MAX_TEXT,
        pattern=NUL_FREE,
        description=f"At most {MAX_TEXT:,} characters, without NUL.",
    ),
]
RequiredText = Annotated[
    Text,
    Meta(
        description=f"1 to {MAX_TEXT:,} characters that are not all blank, without NUL.",
        extra_json_schema={"minLength": 1, "allOf": [{"pattern": r"\S"}]},
    ),
]
"""The handler rejects blank text itself, since a pattern's message would be unclear."""
MAX_KEY = 255
A_KEY = f"1 to {MAX_KEY} visible ASCII characters"
"""What an Idempotency-Key consists of."""
AN_ID = f"1 to {MAX_NAME} characters without control characters"
ConversationId = Annotated[
    str,
    Meta(
        title=AN_ID,
        max_length=MAX_NAME,
        pattern=CONTROL_FREE,
        description=f"{AN_ID}; blanks before and after them do not count.",
    ),
]
NumberAsId = Annotated[
    int,
    Meta(
        title="a whole number of at most 64 bits",
        ge=-(2**63),
        le=2**63 - 1,
        description="A whole number, as chat platforms have them: taken as its text.",
    ),
]
Name = Annotated[str, Meta(max_length=MAX_NAME, pattern=CONTROL_FREE, description="A name of the configuration.")]


def id_text(given: str | int | None) -> str:
    """A conversation's id as it is stored: trimmed; empty where the client gave none."""
    return "" if given is None else str(given).strip()
