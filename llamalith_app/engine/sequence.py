"""One prompt on its way to a reply: its tokens, how far it is, and the text so far.

State only: what is done with it next, the scheduler decides.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from llamalith_app.engine.messages import FinishReason
from llamalith_app.engine.text import ReplyText


@dataclass
class Sequence:
    id: int
    prompt: Items[int]
    max_tokens: int
    text: ReplyText
    omitted_messages: int = 0
    slot: int | None = None
    """Set when it is admitted, None again when it ends."""
    n_evaluated: int = 0
    """Of its tokens, those that stand in the slot: reused, prefilled, then decoded."""
    generated: list[int] = field(default_factory=list)
    """Sampled so far; the last of them is evaluated by the next step."""
    finish: FinishReason | None = None

    @property
    def in_prefill(self) -> bool:
        return self.n_evaluated < len(self.prompt)

    @property
    def prompt_done(self) -> int:
        return min(self.n_evaluated, len(self.prompt))
