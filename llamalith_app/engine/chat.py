"""From a turn's messages to a prompt that fits the context.

Owns the policy of what is left out (oldest turns first; never the system message or the newest prompt) and of how
messages are put for templates that insist on an order of roles. Pure: rendering and tokenising are passed in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import msgspec

from llamalith_app.engine.messages import ChatMessage
from llamalith_app.engine.steps import Refusal, Rendered

MAX_CHARS_A_TOKEN = 16
"""Turns over the room that is left by this measure are left out without being tokenised."""

Render = Callable[[Sequence[ChatMessage]], Rendered]


class Prompt(msgspec.Struct, frozen=True):
    tokens: list[int]
    stop: tuple[str, ...]
    omitted_messages: int


def fit(
    messages: Sequence[ChatMessage],
    render: Render,
    tokenize: Callable[[str], list[int]],
    *,
    n_ctx: int,
    max_tokens: int,
) -> Prompt:
    """The longest run of newest turns that leaves room for the reply: `max_tokens`, a quarter of the context at most.

    Raises Refusal (context_overflow, template).
    """
    n_reserved = min(max_tokens, n_ctx // 4)
    n_room = n_ctx - n_reserved
    system, turns = _split(messages)

    def without(n_turns: int) -> Prompt:
        kept = [*system, *itertools.chain.from_iterable(turns[n_turns:])]
        rendered = _render(kept, render)
        return Prompt(tokenize(rendered.text), rendered.stop, len(messages) - len(kept))

    n_newest = len(turns) - 1
    n_least = _n_surely_too_old(system, turns, n_room)
    if _fits(prompt := without(n_least), n_room):
        return prompt
    if n_least < n_newest:
        prompt = without(n_newest)
    if not _fits(prompt, n_room):
        together = " together with its system message" if system else ""
        raise Refusal(
            "context_overflow",
            f"The prompt has {len(prompt.tokens)} tokens{together}; {n_room} fit "
            f"(context of {n_ctx} tokens, {n_reserved} kept for the reply).",
        )
    low, high = n_least + 1, n_newest
    while low < high:
        middle = (low + high) // 2
        if _fits(trial := without(middle), n_room):
            prompt, high = trial, middle
        else:
            low = middle + 1
    return prompt


def _fits(prompt: Prompt, n_room: int) -> bool:
    return len(prompt.tokens) <= n_room


def _split(messages: Sequence[ChatMessage]) -> tuple[list[ChatMessage], list[list[ChatMessage]]]:
    """The leading system messages, and turns: a user's message and what follows it. What stands before the first
    user's message is a turn too."""
    n_system = next((at for at, one in enumerate(messages) if one.role != "system"), len(messages))
    turns: list[list[ChatMessage]] = []
    for message in messages[n_system:]:
        if message.role == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return list(messages[:n_system]), turns or [[]]


def _n_surely_too_old(
    system: Sequence[ChatMessage], turns: Sequence[Sequence[ChatMessage]], n_room: int
) -> int:
    """How many of the oldest turns need no tokenising to be known as too much."""
    n_chars = sum(len(message.content) for message in system)
    for n_kept, turn in enumerate(reversed(turns)):
        n_chars += sum(len(message.content) for message in turn)
        if n_kept and n_chars > n_room * MAX_CHARS_A_TOKEN:
            return len(turns) - n_kept
    return 0


def _render(messages: Sequence[ChatMessage], render: Render) -> Rendered:
    """As they are, else in the shapes that templates with rules about roles take. Raises the first Refusal."""
    refusal: Refusal | None = None
    for shaped in (lambda: messages, lambda: _joined(messages), lambda: _folded(messages)):
        try:
            return render(shaped())
        except Refusal as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _joined(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Neighbouring messages of one role as one."""
    return [
        ChatMessage(role, "\n\n".join(message.content for message in group))
        for role, group in itertools.groupby(messages, key=lambda message: message.role)
    ]


def _folded(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """What stands before the first user's message as the head of that message."""
    n_before = next((at for at, one in enumerate(messages) if one.role == "user"), 0)
    first = "\n\n".join(message.content for message in messages[: n_before + 1])
    return _joined([ChatMessage("user", first), *messages[n_before + 1 :]])
