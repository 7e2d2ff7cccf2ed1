"""One sequence: its prompt, how far it is evaluated, what it has written, and when it ends.

State lives here, decisions in `scheduler.py`, hardware in the runner.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from llamalith_app.engine.messages import Advance, FinishReason, Sampling
from llamalith_app.engine.steps import Vocabulary
from llamalith_app.engine.text import Detokenizer


@dataclass(slots=True, eq=False)
class Sequence:
    id: int
    prompt: list[int]
    """At least one token."""
    sampling: Sampling
    text: Detokenizer
    """Grows with each token of the reply; knows the stop strings."""
    grammar: str = ""
    omitted_messages: int = 0
    slot: int | None = None
    """None: waits; set once, when it is admitted."""
    n_done: int = 0
    """Leading tokens of prompt and reply that stand in the slot; starts with what was reused, grows each step."""
    reply: list[int] = field(default_factory=list)
    """Sampled so far; the last one is evaluated in the next step."""

    @property
    def is_prefilling(self) -> bool:
        return self.n_done < len(self.prompt)

    def next_tokens(self, n_chunk: int) -> Tokens[int]:
        """What is evaluated next: a chunk of the prompt, or the last token of the reply."""
        return self.prompt[self.n_done : self.n_done + n_chunk] if self.is_prefilling else self.reply[-1:]

    def advance(self, finish: FinishReason | None = None) -> Advance:
        """A step in which nothing was written."""
        return Advance(
            sequence_id=self.id,
            prompt_tokens=len(self.prompt),
            prompt_done=min(self.n_done, len(self.prompt)),
            omitted_messages=self.omitted_messages,
            finish=finish,
        )

    def write(self, token: int, vocabulary: Vocabulary, n_ctx: int) -> Advance:
        """A step that sampled a token. Ends at the model's end, at a stop string, at max_tokens or when the slot is full."""
        tokens, text = [], ""
        finish: FinishReason | None = "stop"
        if not vocabulary.is_end(token):
            tokens = [token]
            self.reply.append(token)
            text = self.text.push(vocabulary.piece(token))
            if not self.text.stopped:
                is_full = len(self.prompt) + len(self.reply) >= n_ctx
                finish = "length" if is_full or len(self.reply) >= self.sampling.max_tokens else None
        if finish is not None:
            text += self.text.flush()
        return Advance(
            sequence_id=self.id,
            prompt_tokens=len(self.prompt),
            prompt_done=len(self.prompt),
            tokens=tokens,
            text=text,
            omitted_messages=self.omitted_messages,
            finish=finish,
        )
