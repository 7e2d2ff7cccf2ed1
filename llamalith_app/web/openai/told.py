"""How a job looks to an OpenAI client: as a chat completion or a completion, whole or in chunks. Pure.

A client cannot take back text that it got. So of a reply that is begun anew only what goes beyond that text is told,
as long as it begins with it (`Said`).
"""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from llamalith_app import __version__
from llamalith_app.contracts.jobs import Job, Progress
from llamalith_app.contracts.openai import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    Completion,
    CompletionTokensDetails,
    FinishReason,
    OpenAIErrorBody,
    OpenAITimings,
    PromptTokensDetails,
    ReplyMessage,
    TextChoice,
    Usage,
)

Kind = Literal["delta", "thinking"]
FINGERPRINT = f"llamalith-{__version__}"
DONE = b"data: [DONE]\n\n"


class Telling(Protocol):
    """One call's answer in a client's shape."""

    def whole(self, job: Job) -> msgspec.Struct:
        """The answer of a job that is done."""

    def begin(self) -> bytes:
        """What a stream begins with, before the job has said anything."""

    def piece(self, kind: Kind, text: str) -> bytes:
        """More of the reply or the thinking; empty: this shape does not tell it."""

    def alive(self) -> bytes:
        """An event that says nothing."""

    def end(self, job: Job) -> bytes:
        """What ends the stream of a job that is done."""

    def failure(self, error: OpenAIErrorBody) -> bytes:
        """What ends a stream without a reply."""


class Said:
    """The text of one kind that a client has, whatever attempt wrote it."""

    def __init__(self) -> None:
        self._text = ""
        self._n_again = 0
        """Characters of it that the attempt after a restart has written, too."""
        self.differs = False
        """An attempt wrote something else than the client has."""

    def add(self, text: str) -> str:
        """What of this text is new to the client."""
        known = self._text[self._n_again : self._n_again + len(text)]
        if not text.startswith(known):
            self.differs = True
        self._n_again += len(text)
        new = text[len(known) :]
        self._text += new
        return new

    @property
    def is_behind(self) -> bool:
        """The attempt after a restart has not written yet what the client has."""
        return self._n_again < len(self._text)

    def restart(self) -> None:
        """What comes now is the text from its beginning."""
        self._n_again = 0


class ChatTelling:
    """`includes_usage`: a stream's last chunk tells the tokens."""

    def __init__(self, job: Job, *, includes_usage: bool) -> None:
        self._job = job
        self._includes_usage = includes_usage

    def whole(self, job: Job) -> ChatCompletion:
        message = ReplyMessage(content=job.result or "", reasoning_content=job.thinking or UNSET)
        return ChatCompletion(
            id=f"chatcmpl-{job.id}",
            object="chat.completion",
            created=int(job.created_at.timestamp()),
            model=job.model,
            system_fingerprint=FINGERPRINT,
            choices=[ChatChoice(index=0, message=message, finish_reason=finish_reason(job))],
            usage=usage(job),
            timings=timings(job),
        )

    def begin(self) -> bytes:
        return self._chunk(ChatDelta(role="assistant", content=""))

    def piece(self, kind: Kind, text: str) -> bytes:
        return self._chunk(ChatDelta(content=text) if kind == "delta" else ChatDelta(reasoning_content=text))

    def alive(self) -> bytes:
        return self._chunk(ChatDelta())

    def end(self, job: Job) -> bytes:
        last = self._chunk(ChatDelta(), finish_reason=finish_reason(job), timings=timings(job))
        if not self._includes_usage:
            return last + DONE
        return last + event(self._made(choices=[], usage=usage(job))) + DONE

    def failure(self, error: OpenAIErrorBody) -> bytes:
        return event(error) + DONE

    def _chunk(
        self,
        delta: ChatDelta,
        finish_reason: FinishReason | None = None,
        timings: OpenAITimings | UnsetType = UNSET,
    ) -> bytes:
        choice = ChatChunkChoice(index=0, delta=delta, finish_reason=finish_reason)
        return event(self._made(choices=[choice], usage=None if self._includes_usage else UNSET, timings=timings))

    def _made(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | UnsetType | None = UNSET,
        timings: OpenAITimings | UnsetType = UNSET,
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=f"chatcmpl-{self._job.id}",
            object="chat.completion.chunk",
            created=int(self._job.created_at.timestamp()),
            model=self._job.model,
            system_fingerprint=FINGERPRINT,
            choices=choices,
            usage=usage,
            timings=timings,
        )


class CompletionTelling:
    """`echo`: what stands before the text."""

    def __init__(self, job: Job, *, includes_usage: bool, echo: str = "") -> None:
        self._job = job
        self._includes_usage = includes_usage
        self._echo = echo

    def whole(self, job: Job) -> Completion:
        text = self._echo + (job.result or "")
        choice = TextChoice(index=0, text=text, finish_reason=finish_reason(job))
        return self._made([choice], usage(job), timings(job))

    def begin(self) -> bytes:
        return self.piece("delta", self._echo) if self._echo else b""

    def piece(self, kind: Kind, text: str) -> bytes:
        return self._chunk(text) if kind == "delta" else b""

    def alive(self) -> bytes:
        return self._chunk("")

    def end(self, job: Job) -> bytes:
        choice = TextChoice(index=0, text="", finish_reason=finish_reason(job))
        last = event(self._made([choice], None if self._includes_usage else UNSET, timings(job)))
        if not self._includes_usage:
            return last + DONE
        return last + event(self._made([], usage(job))) + DONE

    def failure(self, error: OpenAIErrorBody) -> bytes:
        return event(error) + DONE

    def _chunk(self, text: str) -> bytes:
        choice = TextChoice(index=0, text=text, finish_reason=None)
        return event(self._made([choice], None if self._includes_usage else UNSET))

    def _made(
        self,
        choices: list[TextChoice],
        usage: Usage | UnsetType | None = UNSET,
        timings: OpenAITimings | UnsetType = UNSET,
    ) -> Completion:
        return Completion(
            id=f"cmpl-{self._job.id}",
            object="text_completion",
            created=int(self._job.created_at.timestamp()),
            model=self._job.model,
            system_fingerprint=FINGERPRINT,
            choices=choices,
            usage=usage,
            timings=timings,
        )


def event(data: msgspec.Struct) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(data)


def comment(progress: Progress) -> bytes:
    """Where a job stands, in a line that clients skip; empty: its text shows that."""
    if progress.phase == "queued":
        place = "queued" if progress.position is None else f"queued: place {progress.position}"
        begins = "" if progress.start_eta_s is None else f", starts in about {progress.start_eta_s:.0f} s"
        return f": {place}{begins}\n\n".encode()
    if progress.phase == "loading":
        return b": the model is being loaded\n\n"
    if progress.phase == "prefill" and progress.prompt_tokens:
        return f": {progress.prompt_tokens_done or 0} of {progress.prompt_tokens} prompt tokens read\n\n".encode()
    return b""


def finish_reason(job: Job) -> FinishReason:
    return "length" if job.finish_reason == "length" else "stop"


def usage(job: Job) -> Usage:
    n_prompt, n_completion = job.prompt_tokens or 0, job.completion_tokens or 0
    return Usage(
        prompt_tokens=n_prompt,
        completion_tokens=n_completion,
        total_tokens=n_prompt + n_completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=job.prompt_tokens_reused or 0),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=job.thinking_tokens or 0),
    )


def timings(job: Job) -> OpenAITimings | UnsetType:
    """UNSET: not all of its times are known."""
    if job.loaded_at is None or job.prompt_read_at is None or job.processed_at is None:
        return UNSET
    prompt_s = (job.prompt_read_at - job.loaded_at).total_seconds()
    reply_s = (job.processed_at - job.prompt_read_at).total_seconds()
    n_cached, n_completion = job.prompt_tokens_reused or 0, job.completion_tokens or 0
    n_computed = (job.prompt_tokens or 0) - n_cached
    return OpenAITimings(
        cache_n=n_cached,
        prompt_n=n_computed,
        prompt_ms=round(prompt_s * 1000, 3),
        prompt_per_second=round(n_computed / prompt_s, 2) if prompt_s > 0 else 0.0,
        predicted_n=n_completion,
        predicted_ms=round(reply_s * 1000, 3),
        predicted_per_second=round(n_completion / reply_s, 2) if reply_s > 0 else 0.0,
    )
