"""Finds the form in which a chat template takes messages, by rendering a few trial conversations.

Owns the trial conversations and the choice of the form. The template's process uses it, and the runner for formats of
llama-cpp-python. Knows neither Jinja nor llama.cpp.

Many templates silently drop what they do not expect: a system message, or a text where they expect a list of parts.
The trials contain words that no template has, and the rendered prompt shows which of them arrive.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from llamalith_app.engine.messages import ChatMessage

Message = dict[str, Any]
"""A message as a template gets it: `role`, and `content`, which is a text or a list of parts."""
Render = Callable[[list[Message]], str]
SystemPosition = Literal["own", "first", "last"]
"""Where the system message goes: into a message of its own, or in front of the first or the last user message."""

SYSTEM, QUESTION, REPLY, NEXT = (
    ChatMessage("system", "qx7sysvk"),
    ChatMessage("user", "qx7askvk"),
    ChatMessage("assistant", "qx7repvk"),
    ChatMessage("user", "qx7endvk"),
)
TRIAL = (SYSTEM, QUESTION, REPLY, NEXT)
BETWEEN = "\n\n"


class ContentDropped(Exception):
    """The template drops content that must not be lost. The message calls the template "it"."""


class Form(NamedTuple):
    """How messages are changed before a template gets them."""

    parts: frozenset[str] = frozenset()
    """Roles whose content is a list of parts."""
    system: SystemPosition | None = "own"
    """None: the template shows a system message nowhere."""
    shows_prompt: bool = True
    """Whether the prompt contains the newest user message."""

    def apply(self, messages: Sequence[ChatMessage]) -> list[Message]:
        """The messages in this form. Raises ContentDropped if the template would drop some of them."""
        if not self.shows_prompt:
            raise ContentDropped("it leaves out what the user says")
        system = messages[0] if messages and messages[0].role == "system" else None
        if system is not None and self.system != "own":
            if self.system is None and system.content.strip():
                raise ContentDropped("it leaves out the system message")
            messages = _fold_system(system, messages[1:], self.system)
        return [_template_message(message, self.parts) for message in messages]


def detect(render: Render) -> Form:
    """The form for the template behind `render`. A template that raises at a trial may still take that form: `chat.py`
    handles its refusals."""
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
        system=_system_position(render, parts),
        shows_prompt=True in shown or False not in shown,
    )


def missing(prompt: str, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The messages of users and of the system whose text is not in the prompt: not even half of its words are.
    Templates may trim it, write it as JSON, change its case, or take a word out; what an assistant said they may
    shorten."""
    found, folded = [], ""
    for message in messages:
        text = message.content.strip()
        if message.role == "assistant" or text in prompt:
            continue
        folded = folded or prompt.casefold()
        # A text may be long, and a template may take a word out of it that is meant for the template.
        ends = (text[:MAX_LOOKED_AT], text[-MAX_LOOKED_AT:])
        words = {word for end in ends for word in _WORD.findall(end.casefold())}
        if 2 * sum(word in folded for word in words) < len(words):
            found.append(message)
    return found


MAX_LOOKED_AT = 500
"""Characters at each end of a text."""
_WORD = re.compile(r"[^\W_]+")


def _system_position(render: Render, parts: Collection[str]) -> SystemPosition | None:
    positions: tuple[SystemPosition, ...] = ("own", "first", "last")
    for position in positions:
        shown = [
            _shows(render, _fold_system(SYSTEM, trial, position), [SYSTEM], parts)
            for trial in ([QUESTION], [QUESTION, REPLY, NEXT])
        ]
        if False not in shown:
            return position
    return None


def _shows(
    render: Render, messages: Iterable[ChatMessage], wanted: Iterable[ChatMessage], parts: Collection[str]
) -> bool | None:
    """Whether the rendered prompt contains the wanted messages; None: the template raises."""
    try:
        prompt = render([_template_message(message, parts) for message in messages]).casefold()
    except Exception:  # noqa: BLE001 - a template may raise anything
        return None
    return all(_contains(prompt, message.content) for message in wanted)


def _contains(prompt: str, word: str) -> bool:
    """Whether the word is in the prompt, except in a list of parts that the template wrote out as Python or JSON does:
    the model was not trained on such lists."""
    return word in prompt and not re.search(rf"""['"]text['"]: ?['"]{word}""", prompt)


def _fold_system(
    system: ChatMessage, rest: Sequence[ChatMessage], position: SystemPosition | None
) -> list[ChatMessage]:
    users = [at for at, message in enumerate(rest) if message.role == "user"]
    if position == "own":
        return [system, *rest]
    if position is None or not users:
        return list(rest)
    at = users[0] if position == "first" else users[-1]
    joined = ChatMessage("user", f"{system.content}{BETWEEN}{rest[at].content}")
    return [*rest[:at], joined, *rest[at + 1 :]]


def _template_message(message: ChatMessage, parts: Collection[str]) -> Message:
    content = [{"type": "text", "text": message.content}] if message.role in parts else message.content
    return {"role": message.role, "content": content}
