"""In which form a chat template takes messages, found by rendering a few conversations that are never sent.

Many templates drop what they do not expect instead of refusing it: a system message, or a text where they walk over a
list of parts. Unlikely words show what arrives in the prompt and what does not. Knows no Jinja and no llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from llamalith_app.engine.messages import ChatMessage

Message = dict[str, Any]
"""As templates get it: `role`, and `content`, a text or a list of parts."""
Render = Callable[[list[Message]], str]
SystemPlace = Literal["own", "first", "last"]
"""A system message stands as it is, or in front of the first or of the last user message."""

SYSTEM, QUESTION, REPLY, NEXT = (
    ChatMessage("system", "qx7sysvk"),
    ChatMessage("user", "qx7askvk"),
    ChatMessage("assistant", "qx7repvk"),
    ChatMessage("user", "qx7endvk"),
)
BETWEEN = "\n\n"


class LeftOut(Exception):
    """The template drops what it must not; a sentence without its subject."""


class Form(NamedTuple):
    parts: frozenset[str] = frozenset()
    """Roles whose content is a list of parts."""
    system: SystemPlace | None = "own"
    """None: the template shows it nowhere."""
    shows_prompt: bool = True

    def apply(self, messages: Sequence[ChatMessage]) -> list[Message]:
        """What the template is given. Raises LeftOut."""
        if not self.shows_prompt:
            raise LeftOut("it leaves out what the user says")
        system = messages[0] if messages and messages[0].role == "system" else None
        if system is not None and self.system != "own":
            if self.system is None and system.content.strip():
                raise LeftOut("it leaves out the system message")
            messages = _folded(system, messages[1:], self.system)
        return [_written(message, self.parts) for message in messages]


def find(render: Render) -> Form:
    """A template that raises is not judged by that: how its refusals are met is not decided here."""
    parts: set[str] = set()
    for role, trial in (
        ("user", [QUESTION]),
        ("assistant", [QUESTION, REPLY, NEXT]),
        ("system", [SYSTEM, QUESTION]),
    ):
        wanted = [message for message in trial if message.role == role][:1]
        if not _shows(render, trial, wanted, parts) and _shows(render, trial, wanted, {*parts, role}):
            parts.add(role)
    asked = [([QUESTION], QUESTION), ([SYSTEM, QUESTION], QUESTION), ([QUESTION, REPLY, NEXT], NEXT)]
    shown = [_shows(render, trial, [last], parts) for trial, last in asked]
    return Form(
        parts=frozenset(parts),
        system=_system_place(render, parts),
        shows_prompt=True in shown or False not in shown,
    )


def _system_place(render: Render, parts: Collection[str]) -> SystemPlace | None:
    places: tuple[SystemPlace, ...] = ("own", "first", "last")
    for place in places:
        shown = [
            _shows(render, _folded(SYSTEM, trial, place), [SYSTEM], parts)
            for trial in ([QUESTION], [QUESTION, REPLY, NEXT])
        ]
        if False not in shown:
            return place
    return None


def _shows(
    render: Render, messages: Iterable[ChatMessage], wanted: Iterable[ChatMessage], parts: Collection[str]
) -> bool | None:
    """Whether the prompt has what was wanted in it; None: the template raises."""
    try:
        prompt = render([_written(message, parts) for message in messages]).casefold()
    except Exception:  # noqa: BLE001 - a template is a program of the model's maker
        return None
    return all(_stands_in(prompt, message.content) for message in wanted)


def _stands_in(prompt: str, word: str) -> bool:
    """In any case, but not where the template wrote a part as Python or JSON does: its model never saw such a list."""
    return word in prompt and not re.search(rf"""['"]text['"]: ?['"]{word}""", prompt)


def _folded(system: ChatMessage, rest: Sequence[ChatMessage], place: SystemPlace | None) -> list[ChatMessage]:
    users = [at for at, message in enumerate(rest) if message.role == "user"]
    if place == "own":
        return [system, *rest]
    if place is None or not users:
        return list(rest)
    at = users[0] if place == "first" else users[-1]
    joined = ChatMessage("user", f"{system.content}{BETWEEN}{rest[at].content}")
    return [*rest[:at], joined, *rest[at + 1 :]]


def _written(message: ChatMessage, parts: Collection[str]) -> Message:
    content = [{"type": "text", "text": message.content}] if message.role in parts else message.content
    return {"role": message.role, "content": content}
