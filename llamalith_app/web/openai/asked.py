"""What a call of an OpenAI client asks: its body as the request of a job and the messages that it answers. Pure.

What cannot be done is refused with the field's name; what decides nothing is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from llamalith_app.contracts.conversations import Message
from llamalith_app.contracts.jobs import JobRequest, PriorityWord
from llamalith_app.contracts.openai import (
    TEXT_PARTS,
    ChatCompletionCreate,
    ChatMessage,
    CompletionCreate,
    ContentPart,
    Sampled,
)
from llamalith_app.contracts.parameters import EffortWord
from llamalith_app.errors import BadInput

PRIORITIES: Mapping[str, PriorityWord] = {"flex": "batch", "priority": "interactive"}
"""By service tier."""
ROLES = {"developer": "system"}
COPIED = (
    *("temperature", "top_k", "min_p", "typical_p", "repeat_penalty", "presence_penalty", "frequency_penalty"),
    "model",
)
EFFORTS: Mapping[Any, EffortWord] = {"minimal": "low", "xhigh": "high", "max": "high"}
"""Those that have another name here."""
LEAST_SHARE = 1e-6
NO_TOOLS = "tools come with a later version of this server"
TEXT_ALONE = "this server reads text alone"


class Asked(NamedTuple):
    request: JobRequest
    """Without its prompt."""
    history: list[Message]


def chat(body: ChatCompletionCreate) -> Asked:
    """Raises BadInput."""
    _refuse_common(body)
    refuse(body, ("tools", "functions"), NO_TOOLS)
    refuse(body, ("audio",), TEXT_ALONE)
    if body.top_logprobs:
        raise BadInput(f"top_logprobs: {NO_LOGPROBS}")
    request = _request(
        body,
        body.max_completion_tokens or body.max_tokens,
        response_format=body.response_format,
        reasoning_effort=effort(body.reasoning_effort),
        chat_template_kwargs=body.chat_template_kwargs,
    )
    return Asked(request, history(body.messages))


def effort(given: Any) -> Any:
    """A client's effort as a job's."""
    return EFFORTS.get(given, given)


def completion(body: CompletionCreate) -> Asked:
    """Raises BadInput."""
    _refuse_common(body)
    if body.suffix:
        raise BadInput("suffix: text cannot be inserted before another; leave it out")
    if (body.best_of or 1) > 1:
        raise BadInput("best_of: one completion is drawn for each call, so only 1 is possible")
    prompt = body.prompt if isinstance(body.prompt, str) else body.prompt[0]
    request = _request(body, body.max_tokens, raw=True)
    return Asked(request, [Message(role="user", content=prompt)])


def history(messages: Sequence[ChatMessage]) -> list[Message]:
    """Raises BadInput for what no model of this server reads, with its place."""
    found = [_message(f"messages[{at}]", message) for at, message in enumerate(messages)]
    if all(message.role == "system" for message in found):
        raise BadInput("messages: expected at least one that is not a system message")
    return found


def _message(place: str, message: ChatMessage) -> Message:
    if message.role in ("tool", "function") or message.tool_calls:
        raise BadInput(f"{place}: {NO_TOOLS}")
    content = message.content
    if content is None and message.role != "assistant":
        raise BadInput(f"{place}.content: expected a string or a list of text parts")
    text = content if isinstance(content, str) else joined(f"{place}.content", content or ())
    return Message(role=ROLES.get(message.role, message.role), content=text)


def joined(place: str, parts: Sequence[ContentPart]) -> str:
    """The text of a content that comes in parts. Raises BadInput."""
    texts = []
    for at, part in enumerate(parts):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in TEXT_PARTS:
            raise BadInput(f"{place}[{at}]: a part of type {_quoted(part.type)} cannot be read; {TEXT_ALONE}")
        if text is None:
            raise BadInput(f"{place}[{at}].text: missing")
        texts.append(text)
    return "".join(texts)


NO_LOGPROBS = "the probabilities of tokens are not told here"


def _request(body: Sampled, max_tokens: int | None, **more: Any) -> JobRequest:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    return JobRequest(
        **{name: getattr(body, name) for name in COPIED},
        max_tokens=max_tokens,
        top_p=None if body.top_p is None else max(body.top_p, LEAST_SHARE),
        seed=None if body.seed is None else body.seed % 2**32,
        stop=tuple(text for text in stop if text) or None if stop else None,
        priority=PRIORITIES.get(body.service_tier or "", "normal"),
        truncation=body.truncation or "disabled",
        **more,
    )


def _refuse_common(body: Sampled) -> None:
    if (body.n or 1) > 1:
        raise BadInput("n: one reply is drawn for each call, so only 1 is possible; send the call again for another")
    refuse(body, ("logit_bias",), "the probabilities of single tokens cannot be changed here")
    refuse(body, ("logprobs",), NO_LOGPROBS)


def refuse(body: msgspec.Struct, names: Sequence[str], why: str) -> None:
    """Raises BadInput for the first of these fields that asks for something."""
    for name in names:
        if getattr(body, name):
            raise BadInput(f"{name}: {why}; leave it out")


def _quoted(word: str) -> str:
    return f'"{word[:40]}"'
