"""Keeps what people type from becoming control tokens.

Chat templates write control tokens by their texts, and llama.cpp finds such a text wherever it stands in a prompt. So
`mark` puts a character that nobody typed behind the first one of each such text in a message, before the template sees
it; `remove` takes the tokens of that character out of the prompt again. The template's own control tokens stay what
they are, and so do the tokens of all other text. Pure: knows no llama.cpp and no template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from llamalith_app.engine.messages import ChatMessage

_FIRST_MARK, _N_MARKS = 0xE000, 6400
"""The private-use characters of Unicode's first plane: no template writes one."""


def controls_of(texts: Iterable[str]) -> tuple[str, ...]:
    """The texts of control tokens as `mark` takes them. One of a single character cannot be divided."""
    return tuple(sorted({text for text in texts if len(text) > 1}, key=lambda text: (-len(text), text)))


def mark(
    messages: Sequence[ChatMessage], controls: Sequence[str], thinking_tags: Sequence[str]
) -> tuple[list[ChatMessage], str]:
    """The messages with each control text divided by the mark, and the mark; "" if there was nothing to divide.

    `controls`: of `controls_of`. `thinking_tags` stay whole in what a model wrote: templates look for them there, and
    leave out the thinking of earlier turns.
    """
    found = [[text for text in controls if text in message.content] for message in messages]
    for texts, message in zip(found, messages, strict=True):
        if message.role == "assistant":
            texts[:] = [text for text in texts if text not in thinking_tags]
    if not any(found):
        return list(messages), ""
    mark = _unused(messages)
    return [_divided(message, texts, mark) for message, texts in zip(messages, found, strict=True)], mark


def _unused(messages: Sequence[ChatMessage]) -> str:
    candidates = map(chr, range(_FIRST_MARK, _FIRST_MARK + _N_MARKS))
    return next(one for one in candidates if not any(one in message.content for message in messages))


def _divided(message: ChatMessage, texts: Sequence[str], mark: str) -> ChatMessage:
    content = message.content
    for text in texts:
        content = content.replace(text, text[0] + mark + text[1:])
    return ChatMessage(message.role, content)


def remove(tokens: Iterable[int], mark: str, piece: Callable[[int], bytes]) -> tuple[list[int], int]:
    """The tokens without those that are the mark, and how many marks there were. `piece`: the bytes of a token. A mark
    that shares a token with other text is not found."""
    data, n_removed = mark.encode(), 0
    kept: list[int] = []
    held: list[int] = []
    seen = b""
    for token in tokens:
        held.append(token)
        seen += piece(token)
        if seen == data:
            held, seen, n_removed = [], b"", n_removed + 1
        elif not data.startswith(seen):
            # The last token may begin a mark by itself.
            begins = data.startswith(piece(token)) and len(held) > 1
            kept += held[:-1] if begins else held
            held, seen = ([token], piece(token)) if begins else ([], b"")
    return kept + held, n_removed
