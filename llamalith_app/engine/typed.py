"""Keeps what people type from becoming control tokens.

Chat templates write control tokens by their texts, and llama.cpp finds such a text wherever it stands in a prompt. So
`mark` puts a character that nobody typed behind the first one of each such text in a message, before the template sees
it; `remove` takes the tokens of that character out of the prompt again. The template's own control tokens stay what
they are, and so do the tokens of all other text. Pure: knows no llama.cpp and no template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from llamalith_app.engine.messages import ChatMessage
from llamalith_app.engine.runner_protocol import Refusal

Controls = Mapping[str, Sequence[str]]
"""Texts of control tokens by their beginning: some vocabularies have thousands, and few messages have a beginning."""

_FIRST_MARK, _N_MARKS = 0xE000, 6400
"""The private-use characters of Unicode's first plane: no template writes one."""
_N_BEGINNING = 3


def controls_of(texts: Iterable[str]) -> Controls:
    """The texts of control tokens as `mark` takes them. One of a single character cannot be divided."""
    controls: dict[str, list[str]] = {}
    for text in texts:
        if len(text) > 1:
            controls.setdefault(text[:_N_BEGINNING], []).append(text)
    return controls


def control_in(texts: Iterable[str], controls: Controls) -> str:
    """The text of a control token that stands in one of them; empty: there is none."""
    found = (one for text in texts for one in _found(ChatMessage("user", text), controls, ()))
    return next(found, "")


def mark(
    messages: Sequence[ChatMessage], controls: Controls, thinking_tags: Sequence[str]
) -> tuple[list[ChatMessage], str]:
    """The messages with each control text divided by the mark, and the mark; "" if there was nothing to divide.

    `thinking_tags` stay whole in what a model wrote: templates look for them there, and leave out the thinking of
    earlier turns. Raises Refusal if every character that could be the mark was typed.
    """
    found = [_found(message, controls, thinking_tags) for message in messages]
    if not any(found):
        return list(messages), ""
    mark = _unused(messages)
    return [_divided(message, texts, mark) for message, texts in zip(messages, found, strict=True)], mark


def _found(message: ChatMessage, controls: Controls, thinking_tags: Sequence[str]) -> list[str]:
    kept = thinking_tags if message.role == "assistant" else ()
    begun = (texts for beginning, texts in controls.items() if beginning in message.content)
    return [text for texts in begun for text in texts if text in message.content and text not in kept]


def _unused(messages: Sequence[ChatMessage]) -> str:
    used = set[str]().union(*(message.content for message in messages))
    free = (chr(code) for code in range(_FIRST_MARK, _FIRST_MARK + _N_MARKS) if chr(code) not in used)
    if mark := next(free, ""):
        return mark
    raise Refusal(
        "template",
        "The conversation has the text of a control token, and every character by which such a text could be divided"
        " (U+E000 to U+F8FF).",
    )


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
