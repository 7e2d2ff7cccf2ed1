"""Responses: what a call of `/v1/responses` asks, and how its job looks as a response, whole or as a stream. Pure.

A stream's event numbers follow from the text before it, so that every reader gets the same ones, however the text came,
and a client resumes behind any of them (`starting_after`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from llamalith_app.contracts.conversations import Message
from llamalith_app.contracts.jobs import Job, JobRequest
from llamalith_app.contracts.openai import OpenAIErrorBody
from llamalith_app.contracts.responses import (
    IncompleteDetails,
    InputItem,
    InputTokensDetails,
    ItemStatus,
    OutputMessage,
    OutputReasoning,
    OutputText,
    OutputTokensDetails,
    ReasoningText,
    Response,
    ResponseCreate,
    ResponseStatus,
    ResponseUsage,
    TextFormatTold,
)
from llamalith_app.errors import BadInput
from llamalith_app.web import openai_errors as errors
from llamalith_app.web.openai.asked import LEAST_SHARE, NO_LOGPROBS, NO_TOOLS, PRIORITIES, ROLES, effort, joined, refuse
from llamalith_app.web.openai.told import Kind, event

RESPONSE = re.compile(r"resp_([1-9][0-9]{0,17})")
ITEM = re.compile(r"(msg|rs)_([1-9][0-9]{0,17})(?:_[0-9]{1,5})?")
STATUSES: Mapping[str, ResponseStatus] = {
    "queued": "queued",
    "processing": "in_progress",
    "done": "completed",
    "error": "failed",
    "cancelled": "cancelled",
}


class AskedResponse(NamedTuple):
    request: JobRequest
    """Without its prompt."""
    messages: list[Message | int]
    """Without the instructions; a number: the reply of that job."""
    previous: int | None
    """The job of the previous response."""


def asked(body: ResponseCreate) -> AskedResponse:
    """Raises BadInput."""
    refuse(body, ("tools",), NO_TOOLS)
    refuse(body, ("conversation", "prompt"), "what OpenAI keeps is not here; send the messages as input")
    refuse(body, ("top_logprobs",), NO_LOGPROBS)
    if isinstance(body.input, str):
        messages: list[Message | int] = [Message(role="user", content=body.input)]
    else:
        found = [_message(f"input[{at}]", item) for at, item in enumerate(body.input)]
        messages = [message for message in found if message is not None]
    if all(isinstance(message, Message) and message.role == "system" for message in messages):
        raise BadInput("input: expected at least one message that is not a system message")
    request = JobRequest(
        model=body.model,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=None if body.top_p is None else max(body.top_p, LEAST_SHARE),
        response_format=None if body.text is None else body.text.format,
        priority=PRIORITIES.get(body.service_tier or "", "normal"),
        reasoning_effort=None if body.reasoning is None else effort(body.reasoning.effort),
        truncation=body.truncation or "disabled",
    )
    previous = None if body.previous_response_id is None else job_id(body.previous_response_id)
    return AskedResponse(request, messages, previous)


def job_id(response_id: str) -> int:
    """The job of a response. 0: there is none with such an id."""
    found = RESPONSE.fullmatch(response_id)
    return 0 if found is None else int(found[1])


def _message(place: str, item: InputItem) -> Message | int | None:
    """None: nothing that a model reads."""
    kind = item.type or "message"
    if kind == "reasoning":
        return None
    if kind == "item_reference":
        found = ITEM.fullmatch(item.id or "")
        if found is None:
            raise BadInput(f"{place}.id: expected the id of an item of a response, such as msg_12")
        return int(found[2]) if found[1] == "msg" else None
    if kind != "message":
        raise BadInput(f'{place}: an item of type "{kind[:40]}" cannot be read; {NO_TOOLS}')
    if item.role is None or item.content is None:
        raise BadInput(f"{place}.{'role' if item.role is None else 'content'}: missing")
    content = item.content if isinstance(item.content, str) else joined(f"{place}.content", item.content)
    return Message(role=ROLES.get(item.role, item.role), content=content)


class Told(NamedTuple):
    """What of a response is not in its job."""

    background: bool
    store: bool
    previous: int | None
    """The job that it goes on from."""
    metadata: Mapping[str, Any]


def response(job: Job, told: Told) -> Response:
    parameters = job.parameters
    is_cut = job.status == "done" and job.finish_reason == "length"
    status = STATUSES[job.status]
    # Clients that poll a background response wait for `completed`.
    if is_cut and not told.background:
        status = "incomplete"
    wanted = None if parameters is None else parameters.response_format
    return Response(
        id=f"resp_{job.id}",
        created_at=int(job.created_at.timestamp()),
        completed_at=int(job.processed_at.timestamp()) if job.status == "done" and job.processed_at else None,
        status=status,
        background=told.background,
        error=errors.of_job(job).error if job.status in ("error", "cancelled") else None,
        incomplete_details=IncompleteDetails(reason="max_output_tokens") if is_cut else None,
        instructions=job.system_prompt or None,
        max_output_tokens=None if parameters is None else parameters.max_tokens,
        metadata=dict(told.metadata),
        model=job.model,
        output=_output(job, "incomplete" if is_cut else "completed") if job.status == "done" else [],
        previous_response_id=None if told.previous is None else f"resp_{told.previous}",
        store=told.store,
        temperature=None if parameters is None else parameters.temperature,
        text=TextFormatTold(format={"type": "text"} if wanted is None else msgspec.to_builtins(wanted)),
        top_p=None if parameters is None else parameters.top_p,
        truncation="auto" if parameters is None else parameters.truncation or "auto",
        usage=_usage(job) if job.status == "done" else None,
    )


def _output(job: Job, status: ItemStatus) -> list[OutputMessage | OutputReasoning]:
    output: list[OutputMessage | OutputReasoning] = []
    if job.thinking:
        output.append(
            OutputReasoning(id=f"rs_{job.id}", status="completed", content=[ReasoningText(text=job.thinking)])
        )
    output.append(OutputMessage(id=f"msg_{job.id}", status=status, content=[OutputText(text=job.result or "")]))
    return output


def _usage(job: Job) -> ResponseUsage:
    n_input, n_output = job.prompt_tokens or 0, job.completion_tokens or 0
    return ResponseUsage(
        input_tokens=n_input,
        input_tokens_details=InputTokensDetails(cached_tokens=job.prompt_tokens_reused or 0),
        output_tokens=n_output,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=job.thinking_tokens or 0),
        total_tokens=n_input + n_output,
    )


class ResponseTelling:
    """`after`: the number of the last event that the client has; -1: none."""

    def __init__(self, job: Job, told: Told, *, after: int = -1) -> None:
        self._job = job
        self._told = told
        self._after = after
        self._n = -1
        """The number of the last event."""
        self._texts: dict[Kind, str] = {"thinking": "", "delta": ""}
        self._open: Kind | None = None
        """The item that is being written."""
        self._n_items = 0

    def whole(self, job: Job) -> Response:
        return response(job, self._told)

    def begin(self) -> bytes:
        created = self._event("response.created", response=self._before_its_end("queued"))
        return created + self._event("response.in_progress", response=self._before_its_end("in_progress"))

    def piece(self, kind: Kind, text: str) -> bytes:
        told = self._open_item(kind)
        self._texts[kind] += text
        return told + self._delta(kind, text)

    def alive(self) -> bytes:
        """An event that says nothing, with the number of the last one."""
        running = self._before_its_end("in_progress")
        return _named("response.in_progress", {"sequence_number": max(self._n, self._after), "response": running})

    def end(self, job: Job) -> bytes:
        told = self._open_item("delta")
        ended = response(job, self._told)
        told += self._close_item("incomplete" if ended.incomplete_details else "completed")
        word = "response.incomplete" if ended.status == "incomplete" else "response.completed"
        return told + self._event(word, response=ended)

    def failure(self, error: OpenAIErrorBody) -> bytes:
        failed = msgspec.structs.replace(self._before_its_end("failed"), error=error.error)
        # Some clients handle no event of a failure, and would end as if all was said.
        return self._event("response.failed", response=failed) + event(error)

    def _before_its_end(self, status: ResponseStatus) -> Response:
        queued = msgspec.structs.replace(self._job, status="queued", processed_at=None, error=None)
        return msgspec.structs.replace(response(queued, self._told), status=status)

    def _open_item(self, kind: Kind) -> bytes:
        if self._open == kind:
            return b""
        told = self._close_item("completed") if self._open is not None else b""
        self._open = kind
        item: dict[str, Any] = {"id": self._item_id(kind), "status": "in_progress"}
        if kind == "thinking":
            item |= {"type": "reasoning", "summary": [], "content": []}
        else:
            item |= {"type": "message", "role": "assistant", "content": []}
        told += self._event("response.output_item.added", output_index=self._n_items, item=item)
        return told + self._of_part(kind, "response.content_part.added", part=_part(kind, ""))

    def _close_item(self, status: ItemStatus) -> bytes:
        kind = self._open
        if kind is None:
            return b""
        text = self._texts[kind]
        told = self._of_part(kind, f"response.{TEXTS[kind]}.done", text=text, **LOGPROBS[kind])
        told += self._of_part(kind, "response.content_part.done", part=_part(kind, text))
        item: dict[str, Any] = {"id": self._item_id(kind), "status": status, "content": [_part(kind, text)]}
        item |= {"type": "reasoning", "summary": []} if kind == "thinking" else {"type": "message", "role": "assistant"}
        told += self._event("response.output_item.done", output_index=self._n_items, item=item)
        self._n_items += 1
        self._open = None
        return told

    def _item_id(self, kind: Kind) -> str:
        return f"{'rs' if kind == 'thinking' else 'msg'}_{self._job.id}"

    def _delta(self, kind: Kind, text: str) -> bytes:
        """Each character counts as an event, so that the numbers do not depend on how the text came in pieces."""
        n_known = min(max(0, self._after - self._n), len(text))
        self._n += len(text)
        if n_known == len(text):
            return b""
        fields = {"delta": text[n_known:], **LOGPROBS[kind]}
        return _named(
            f"response.{TEXTS[kind]}.delta",
            {"sequence_number": self._n, **self._place(kind), **fields},
        )

    def _of_part(self, kind: Kind, word: str, **fields: Any) -> bytes:
        return self._event(word, **self._place(kind), **fields)

    def _place(self, kind: Kind) -> dict[str, Any]:
        return {"item_id": self._item_id(kind), "output_index": self._n_items, "content_index": 0}

    def _event(self, word: str, **fields: Any) -> bytes:
        self._n += 1
        return b"" if self._n <= self._after else _named(word, {"sequence_number": self._n, **fields})


def last_number(job: Job) -> int:
    """The number of the last event of a job that is done."""
    n_items = 2 if job.thinking else 1
    return N_BEGIN + len(job.thinking or "") + len(job.result or "") + n_items * (N_OPEN + N_CLOSE)


N_BEGIN, N_OPEN, N_CLOSE = 2, 2, 3
"""Events at the beginning of a stream, and at the beginning and end of each item."""

TEXTS: Mapping[Kind, str] = {"thinking": "reasoning_text", "delta": "output_text"}
LOGPROBS: Mapping[Kind, dict[str, Any]] = {"thinking": {}, "delta": {"logprobs": []}}


def _part(kind: Kind, text: str) -> msgspec.Struct:
    return ReasoningText(text=text) if kind == "thinking" else OutputText(text=text)


def _named(word: str, fields: Mapping[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (word.encode(), msgspec.json.encode({"type": word, **fields}))
