"""Turns a conversation into prompt tokens that fit the context, or refuses it with a reason.

Owns the choice of the messages that are left out, and the changes of roles for a template that insists on an order.
The threads of the engine that prepare prompts call `fit`. Knows no llama.cpp: the caller passes functions that render
and tokenize.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from llamalith_app.engine import forms
from llamalith_app.engine.messages import ChatMessage
from llamalith_app.engine.runner_protocol import Refusal

Render = Callable[[Sequence[ChatMessage]], str]
Tokenize = Callable[[str], list[int]]

MAX_CHARS_A_TOKEN = 16
"""High estimate of the characters in a token. Older turns that would not fit even by this estimate are left out without
being tokenized."""


class RenderedPrompt(NamedTuple):
    tokens: list[int]
    omitted_messages: int
    """Earlier messages that are not in the prompt: they did not fit, or the template does not show them."""
    opens_thinking: bool = False
    """The prompt ends inside of thinking, which the template opened: the reply begins there."""


def fit(
    messages: Sequence[ChatMessage],
    render: Render,
    tokenize: Tokenize,
    n_ctx: int,
    max_tokens: int,
    thinking_opening: str = "",
    *,
    may_omit: bool = True,
) -> RenderedPrompt:
    """Returns the prompt of the system message and of as many of the newest turns as leave room for the reply.

    The room is `max_tokens`, but at most a quarter of the context. `thinking_opening`: what opens the model's thinking;
    empty: it cannot think. Raises Refusal of the kind `context_overflow` if the newest prompt alone does not fit, or
    the whole without `may_omit`, and of the kind `template` if the chat template refuses every variant of the messages.
    """
    reserve = max(1, min(max_tokens, n_ctx // 4))
    n_fit = n_ctx - reserve
    system = [message for message in messages[:1] if message.role == "system"]
    rest = messages[len(system) :]
    starts = _starts(rest)
    first = _first_possible(rest, starts, n_fit * MAX_CHARS_A_TOKEN)
    if first and not may_omit:
        raise _too_long("many more", n_fit, n_ctx, reserve)
    starts = starts[first:]

    opens_thinking, n_unshown = False, 0

    def tokens_from(start: int) -> list[int]:
        nonlocal opens_thinking, n_unshown
        text, n_unshown = _render_any([*system, *rest[start:]], render)
        if n_unshown and not may_omit:
            raise Refusal(
                "template",
                f"The model's chat template leaves out earlier messages ({n_unshown} here), and none of them may be"
                " (truncation).",
            )
        tokens = tokenize(text) if text else []
        if not tokens:
            raise Refusal("template", "The model's chat template makes nothing of this conversation.")
        opens_thinking = _ends_with(text, thinking_opening, messages[-1].content)
        return tokens

    tokens = tokens_from(starts[0])
    if len(tokens) <= n_fit:
        return RenderedPrompt(tokens, starts[0] + n_unshown, opens_thinking)
    if not may_omit:
        raise _too_long(str(len(tokens)), n_fit, n_ctx, reserve)
    shortest = tokens_from(starts[-1]) if len(starts) > 1 else tokens
    best_unshown = n_unshown
    if len(shortest) > n_fit:
        with_system = " together with its system message" if system else ""
        raise Refusal(
            "context_overflow",
            f"The prompt has {len(shortest)} tokens{with_system}; {n_fit} fit"
            f" (context of {n_ctx} tokens, {reserve} kept for the reply).",
        )
    # Fewer turns never make a longer prompt, so a binary search finds the first start that fits.
    low, high, best = 1, len(starts) - 1, shortest
    while low < high:
        middle = (low + high) // 2
        tokens = tokens_from(starts[middle])
        if len(tokens) <= n_fit:
            high, best, best_unshown = middle, tokens, n_unshown
        else:
            low = middle + 1
    # The end of the prompt does not depend on what is left out at its beginning.
    return RenderedPrompt(best, starts[high] + best_unshown, opens_thinking)


def fit_raw(prompt: str, tokenize: Tokenize, n_ctx: int, max_tokens: int) -> RenderedPrompt:
    """Returns a prompt that is no conversation and needs no template. Raises Refusal of the kind `context_overflow`."""
    reserve = max(1, min(max_tokens, n_ctx // 4))
    tokens = tokenize(prompt)
    if len(tokens) > n_ctx - reserve:
        raise _too_long(str(len(tokens)), n_ctx - reserve, n_ctx, reserve)
    if not tokens:
        raise Refusal("template", "The prompt has no token.")
    return RenderedPrompt(tokens, 0)


def _too_long(n_tokens: str, n_fit: int, n_ctx: int, reserve: int) -> Refusal:
    return Refusal(
        "context_overflow",
        f"The prompt has {n_tokens} tokens; {n_fit} fit (context of {n_ctx} tokens, {reserve} kept for the reply),"
        " and none of it may be left out (truncation).",
    )


def _ends_with(prompt: str, opening: str, newest: str) -> bool:
    """Whether the template wrote this opening at the end of the prompt. One at the end of the newest message does not
    count."""
    prompt, newest = prompt.rstrip(), newest.rstrip()
    return bool(opening) and prompt.endswith(opening) and not (newest.endswith(opening) and prompt.endswith(newest))


def _starts(rest: Sequence[ChatMessage]) -> list[int]:
    """Where the kept messages may begin: at the first message, at any user message, or at an assistant message that was
    submitted as context for the last one."""
    last = len(rest) - 1
    own_context = last - 1
    return [0] + [
        index
        for index in range(1, len(rest))
        if rest[index].role == "user"
        or (index == own_context and index > 0 and rest[index - 1].role == rest[index].role == "assistant")
    ]


def _first_possible(rest: Sequence[ChatMessage], starts: Sequence[int], max_chars: int) -> int:
    """The index of the first start with no more than `max_chars` behind it; otherwise of the last start."""
    n_chars = 0
    for index in range(len(starts) - 1, -1, -1):
        end = starts[index + 1] if index + 1 < len(starts) else len(rest)
        # Every template writes at least one token for a message.
        n_chars += sum(len(message.content) + MAX_CHARS_A_TOKEN for message in rest[starts[index] : end])
        if n_chars > max_chars:
            return min(index + 1, len(starts) - 1)
    return 0


def _render_any(messages: Sequence[ChatMessage], render: Render) -> tuple[str, int]:
    """The first variant whose texts are all in the prompt; else the first one that leaves out nothing but earlier
    messages. Returns how many it leaves out, too. Raises Refusal."""
    reason, incomplete = "", None
    for variant in _variants(messages):
        try:
            prompt = render(variant)
        except Refusal:
            raise
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            reason = reason or str(error).strip() or type(error).__name__
            continue
        missing = forms.missing(prompt, variant)
        if not missing:
            return prompt, 0
        # In a variant, the first message may have it.
        is_system = messages[0].role == "system" and missing[0] is variant[0]
        if variant[-1] in missing or is_system:
            reason = reason or f"it leaves out {'the system message' if is_system else 'what the user says'}"
        elif incomplete is None:
            incomplete = prompt, len(missing)
    if incomplete is not None:
        return incomplete
    raise Refusal("template", f"The model's chat template refuses this conversation: {reason[:500]}")


def _variants(messages: Sequence[ChatMessage]) -> Iterator[Sequence[ChatMessage]]:
    """The messages as they are; then with neighbours of one role joined; then with everything before the first user
    message folded into that message."""
    yield messages
    joined = _join_neighbours(messages)
    yield joined
    first = next((index for index, message in enumerate(joined) if message.role == "user"), None)
    if first:
        folded = "\n\n".join(message.content for message in joined[: first + 1])
        yield [ChatMessage("user", folded), *joined[first + 1 :]]


def _join_neighbours(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    joined: list[ChatMessage] = []
    for message in messages:
        if joined and joined[-1].role == message.role:
            joined[-1] = ChatMessage(message.role, f"{joined[-1].content}\n\n{message.content}")
        else:
            joined.append(message)
    return joined
