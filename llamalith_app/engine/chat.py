"""From a conversation to prompt tokens that fit the context, or a refusal that says why not.

Owns the policy of what is left out and of how roles are bent to a template that insists. Knows no llama.cpp:
it is given a way to render and a way to tokenize.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from llamalith_app.engine.messages import ChatMessage
from llamalith_app.engine.runner_protocol import Refusal

Render = Callable[[Sequence[ChatMessage]], str]
Tokenize = Callable[[str], list[int]]

MAX_CHARS_A_TOKEN = 16
"""Older turns that would not fit if every token were this long are left out without being tokenized."""
OPEN, CLOSE = "<think>", "</think>"
"""Around what a model writes for itself, at the beginning of its reply."""


class RenderedPrompt(NamedTuple):
    tokens: list[int]
    omitted_messages: int
    opens_thinking: bool = False
    """The template itself wrote the OPEN: the reply begins behind it."""


def fit(
    messages: Sequence[ChatMessage], render: Render, tokenize: Tokenize, n_ctx: int, max_tokens: int
) -> RenderedPrompt:
    """Keeps the system message and as many of the newest turns as leave room for the reply.

    The room is max_tokens, but no more than a quarter of the context. Raises Refusal: `context_overflow`
    where the newest prompt alone does not fit, `template` where the chat template takes the messages in no
    form.
    """
    reserve = max(1, min(max_tokens, n_ctx // 4))
    n_fit = n_ctx - reserve
    system = [message for message in messages[:1] if message.role == "system"]
    rest = messages[len(system) :]
    starts = _starts(rest)
    starts = starts[_first_thinkable(rest, starts, n_fit * MAX_CHARS_A_TOKEN) :]

    opens_thinking = False

    def tokens_from(start: int) -> list[int]:
        nonlocal opens_thinking
        text = _rendered([*system, *rest[start:]], render)
        tokens = tokenize(text) if text else []
        if not tokens:
            raise Refusal("template", "The model's chat template makes nothing of this conversation.")
        opens_thinking = _opens_thinking(text, messages[-1].content)
        return tokens

    tokens = tokens_from(starts[0])
    if len(tokens) <= n_fit:
        return RenderedPrompt(tokens, starts[0], opens_thinking)
    shortest = tokens_from(starts[-1]) if len(starts) > 1 else tokens
    if len(shortest) > n_fit:
        with_system = " together with its system message" if system else ""
        raise Refusal(
            "context_overflow",
            f"The prompt has {len(shortest)} tokens{with_system}; {n_fit} fit"
            f" (context of {n_ctx} tokens, {reserve} kept for the reply).",
        )
    # Fewer turns never make a longer prompt, so the first start that fits can be searched for.
    low, high, best = 1, len(starts) - 1, shortest
    while low < high:
        middle = (low + high) // 2
        tokens = tokens_from(starts[middle])
        if len(tokens) <= n_fit:
            high, best = middle, tokens
        else:
            low = middle + 1
    # The end of the prompt is the same, whatever is left out before it.
    return RenderedPrompt(best, starts[high], opens_thinking)


def _opens_thinking(prompt: str, newest: str) -> bool:
    """Not where the newest message says so itself, and the template writes nothing behind it."""
    prompt, newest = prompt.rstrip(), newest.rstrip()
    return prompt.endswith(OPEN) and not (newest.endswith(OPEN) and prompt.endswith(newest))


def _starts(rest: Sequence[ChatMessage]) -> list[int]:
    """Where the kept part may begin: at a prompt, at the context before the last prompt, or at all of it."""
    last = len(rest) - 1
    own_context = last - 1
    return [0] + [
        index
        for index in range(1, len(rest))
        if rest[index].role == "user"
        or (index == own_context and index > 0 and rest[index - 1].role == rest[index].role == "assistant")
    ]


def _first_thinkable(rest: Sequence[ChatMessage], starts: Sequence[int], max_chars: int) -> int:
    """The first of the starts from which there are no more characters than could fit; else the last one."""
    n_chars = 0
    for place in range(len(starts) - 1, -1, -1):
        end = starts[place + 1] if place + 1 < len(starts) else len(rest)
        # Of a message no template leaves less than a token.
        n_chars += sum(len(message.content) + MAX_CHARS_A_TOKEN for message in rest[starts[place] : end])
        if n_chars > max_chars:
            return min(place + 1, len(starts) - 1)
    return 0


def _rendered(messages: Sequence[ChatMessage], render: Render) -> str:
    reason = ""
    for form in _forms(messages):
        try:
            return render(form)
        except Refusal:
            raise
        except Exception as error:  # noqa: BLE001 - a template is a program of the model's maker
            reason = reason or str(error).strip() or type(error).__name__
    raise Refusal("template", f"The model's chat template refuses this conversation: {reason[:500]}")


def _forms(messages: Sequence[ChatMessage]) -> Iterator[Sequence[ChatMessage]]:
    """As they are; neighbours of one role joined; all that comes before the first prompt folded into it."""
    yield messages
    joined = _joined(messages)
    yield joined
    first = next((index for index, message in enumerate(joined) if message.role == "user"), None)
    if first:
        folded = "\n\n".join(message.content for message in joined[: first + 1])
        yield [ChatMessage("user", folded), *joined[first + 1 :]]


def _joined(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    joined: list[ChatMessage] = []
    for message in messages:
        if joined and joined[-1].role == message.role:
            joined[-1] = ChatMessage(message.role, f"{joined[-1].content}\n\n{message.content}")
        else:
            joined.append(message)
    return joined
