"""Types of text that clients send, with their limits."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

MAX_TEXT = 1_000_000
"""Characters (code points) of a prompt, a system prompt or a context."""

CONTROL_FREE = r"\A[^\x00-\x1f\x7f-\x9f]*\Z"

Text = Annotated[
    str,
    Meta(
        max_length=MAX_TEXT,
        pattern=r"\A[^\x00]*\Z",
        description="At most 1,000,000 characters, without NUL.",
    ),
]
ConversationId = Annotated[
    str,
    Meta(
        max_length=200,
        pattern=CONTROL_FREE,
        description="1 to 200 characters without control characters.",
    ),
]
Name = Annotated[str, Meta(max_length=200, pattern=CONTROL_FREE, description="A name of the configuration.")]
