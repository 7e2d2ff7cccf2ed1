"""The requests that make a job, and the answers about jobs.

Field names, types and values are the original's. Fields were added, none was changed.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from llamalith_app.contracts.parameters import Parameters
from llamalith_app.contracts.text import ConversationId, Name, NumberAsId, RequiredText, Text
from llamalith_app.settings import ranges
from llamalith_app.settings.ranges import MaxAttempts

StatusWord = Literal["queued", "processing", "done", "error", "cancelled"]
RetryableWord = Literal["error", "cancelled"]
OpenWord = Literal["queued", "processing"]
PriorityWord = Literal["interactive", "normal", "batch"]
SAME_AGAIN_KINDS = ("context_overflow", "template", "grammar")
"""Kinds of errors with which the same job, tried again, ends again: its prompt or its settings have to change."""
Phase = Literal["queued", "loading", "prefill", "decode"]
Seconds = Annotated[
    ranges.Seconds,
    Meta(
        description=f"More than 0 and at most {ranges.WEEK_S:,} (a week); absent: the configured limit, or none.",
    ),
]


MAX_ID = 2**63 - 1
TurnId = Annotated[int, Meta(ge=1, le=MAX_ID)]


class JobRequest(Parameters, kw_only=True):
    """What every door may ask of a job; texts are trimmed, unknown fields ignored.

    A field stands here, and in a column of `jobs` that has its name: the store copies it from the one to the other.
    Only `parent` is stored with the turn.
    """

    content: Text | None = None
    """Required where there is no `system_prompt`."""
    model: Name | None = None
    """One of the configured names; absent or empty: the first of them."""
    system_prompt: Text | None = None
    """Stored as a system message where it differs from the one in force; alone, without content, too."""
    assistant_context: Text | None = None
    """An assistant's message before the prompt, as if the model had written it."""
    grammar_name: Name | None = None
    """A GBNF grammar of the server's folder; enforced while decoding."""
    timeout_s: Seconds | None = None
    """Seconds that it may run, including the load of the model; then it ends as an error of kind `timeout`."""
    queue_timeout_s: Seconds | None = None
    """Seconds that it may wait for its first start; then it ends as an error of kind `timeout`."""
    max_attempts: MaxAttempts | None = None
    """Starts that may fail or be lost before it ends as an error; absent: the configured number."""
    priority: PriorityWord | None = "normal"
    """`interactive`: a person waits for it; `batch`: no one does."""
    parent: Annotated[int, Meta(ge=0, le=MAX_ID)] | None = None
    """The turn that the prompt continues: one of the conversation, or of the path to its head. 0: none, it begins anew
    in this conversation. Absent: the head. The new turn becomes the head."""


class JobCreate(JobRequest, kw_only=True):
    """A prompt for a new or an existing conversation."""

    conversation_id: ConversationId | NumberAsId | None = None
    """Absent or empty: a new conversation with a UUID."""


MAX_COMPARED = 3


class JobCompare(JobCreate, kw_only=True):
    """One prompt for several models, for a new or an existing conversation."""

    content: RequiredText
    models: Annotated[list[Name], Meta(min_length=1, max_length=MAX_COMPARED)]
    """Different ones of the configured names; in place of `model`. The turn of the first becomes the head."""


class ReplyCreate(JobRequest, kw_only=True):
    """The next prompt of a conversation; an unknown conversation is made."""

    content: RequiredText


class JobChange(msgspec.Struct, kw_only=True):
    """What is to be changed of a job that waits; what is absent or null stays."""

    content: RequiredText | None = None
    """Another prompt, while the job was never started."""
    priority: PriorityWord | None = None


class Regenerate(Parameters, kw_only=True):
    """What is to be different this time; parameters that are absent or null are as the job has them."""

    model: Name | None = None
    """One of the configured names; absent or empty: the job's."""


class LegacySubmit(msgspec.Struct, kw_only=True):
    """The original's older way in; the same as JobCreate with other names."""

    user_input: RequiredText
    session_id: ConversationId | NumberAsId | None = None
    model: Name | None = None
    system_prompt: Text | None = None


class JobAccepted(msgspec.Struct, kw_only=True):
    """It is on disk and will get exactly one answer."""

    ok: bool
    queued: bool
    """False where only a system prompt was stored: there is no job then."""
    job_id: int | None
    conversation_id: str
    created_new: bool
    """True where the server made the conversation's id."""
    model: str
    turn_id: int | None = None
    """The turn that the job answers, to be named as `parent`. Null: a system prompt that was in force already."""


class CompareAccepted(msgspec.Struct, kw_only=True):
    """All of them are on disk, each on a turn of its own; these turns have the same parent."""

    ok: bool
    jobs: list[JobAccepted]
    """In the order of `models`."""


class LegacyAccepted(msgspec.Struct, kw_only=True):
    job_id: int
    conversation_id: str
    created_new: bool


class Progress(msgspec.Struct, kw_only=True):
    """Where a job that has not ended stands. Counts may be missing: they are live, not stored."""

    phase: Phase
    position: int | None = None
    """A queued job's place in the queue of its model; 1 is the next."""
    waits_for: int | None = None
    """The job before a queued one in its conversation, while that has not ended. The queued one starts after it."""
    start_eta_s: float | None = None
    """Seconds until a queued job starts, estimated from recent jobs; null before there are any."""
    eta_s: float | None = None
    """Seconds until it ends, estimated likewise."""
    prompt_tokens: int | None = None
    prompt_tokens_done: int | None = None
    completion_tokens: int | None = None
    tokens_per_s: float | None = None
    """Decode speed of the reply so far; during prefill, that of the prompt."""


class JobError(msgspec.Struct, kw_only=True):
    kind: str
    """Stable: `context_overflow`, `template`, `grammar`, `model_unavailable`, `engine_died`, `worker_lost`,
    `timeout`, `internal`."""
    reason: str


class JobBrief(msgspec.Struct, kw_only=True):
    """A job without what was sent to it and what came of it."""

    id: int
    conversation_id: str
    turn_id: int
    """The turn that it answers, to be named as `parent` by a prompt that continues it."""
    model: str
    status: StatusWord
    created_at: datetime
    processed_at: datetime | None
    grammar_name: str | None
    priority: PriorityWord
    reply_valid: bool | None = None
    """Whether a done job's reply fits its whole schema. Null: it was not validated, because the whole schema was
    enforced, or because that failed (`reply_problem` says why)."""
    attempt: int
    """Times it was started so far."""
    started_at: datetime | None
    error: JobError | None
    finish_reason: str | None
    """`stop`, or `length` where max_tokens or the context ended the reply."""
    prompt_tokens: int | None
    prompt_tokens_reused: int | None = None
    """The tokens of the prompt that the engine still had from an earlier one and did not compute again."""
    completion_tokens: int | None
    thinking_tokens: int | None = None
    """Of these, the tokens that the model thought before its reply; null: not known."""
    omitted_messages: int
    """Earlier messages left out because they did not fit the model's context."""
    timeout_s: float | None = None
    """Seconds that one attempt may run; null: no limit."""
    queue_timeout_s: float | None = None
    """Seconds that it may wait for its first start; null: no limit."""
    max_attempts: int
    """Starts that may fail or be lost before it ends as an error. An attempt that its worker released, because the
    worker ended, does not count."""
    next_attempt_at: datetime | None
    """When a queued job that was started before may start again. Later jobs of its conversation wait too; cancelling it
    lets them run."""
    retry_of: int | None
    """The job that this one retries; it may have expired since."""
    retried_as: int | None
    """The job that retries this one."""
    progress: Progress | None = None
    """Null once it has ended."""


class Job(JobBrief, kw_only=True):
    user_input: str
    system_prompt: str
    parameters: Parameters | None
    """The parameters that were sent with the job; null: none."""
    unenforced: list[str] = []
    """JSON pointers to the keywords of its schema that cannot be enforced while the reply is written, such as
    `#/uniqueItems`. Where there are some, the whole reply is validated at its end."""
    reply_problem: str | None = None
    """The first part of the reply that does not fit, and why; null: there is none."""
    result: str | None
    """The reply when done, the reason when it ended as error."""
    partial: str | None = None
    """The partial reply of a job that was cancelled (present some tenths of a second later) or ended as an error; null:
    nothing was written, or its worker was lost."""
    thinking: str | None = None
    """What the model thought before its reply, or until it was stopped; no later prompt reads it. Null: nothing, or an
    earlier version did not keep it."""
    thinking_s: float | None = None
    """Seconds that it thought; null: not known, because it did so in more than one attempt or was stopped."""
    loaded_at: datetime | None = None
    """When the model was ready for the newest attempt. Null: it came not so far, or is not known; while it runs it may
    be known some seconds later."""
    prompt_read_at: datetime | None = None
    """When the newest attempt had read its prompt; null as above."""
    first_token_at: datetime | None = None
    """When the first token of the newest attempt came; null as above."""


class Attempt(msgspec.Struct, kw_only=True):
    """One start of a job by one worker."""

    attempt: int
    """1 is the first."""
    worker_id: int
    started_at: datetime
    ended_at: datetime | None
    """Null: it runs."""
    outcome: Literal["done", "failed", "lost", "cancelled", "released"] | None
    """`failed` and `lost` (its worker is gone) count against max_attempts. `released` does not: its worker ended, or
    the record was restored from a copy."""
    kind: str | None
    """The kind of a failure, as in JobError; `drained` or `restored` where it was released."""
    reason: str | None
    loaded_at: datetime | None = None
    """When its model was ready. Null: it came not so far, or is not known; while it runs it may be known some seconds
    later."""
    prompt_read_at: datetime | None = None
    """When it had read its prompt; null as above."""
    first_token_at: datetime | None = None
    """When its first token came; null as above."""


class AttemptList(msgspec.Struct, kw_only=True):
    attempts: list[Attempt]
    """Oldest first."""


class Retried(msgspec.Struct, kw_only=True):
    ok: bool
    job_ids: list[int]
    """The new jobs, in the order of those that they retry."""
    more: bool
    """There may be more matching jobs: repeat the request."""


class JobList(msgspec.Struct, kw_only=True):
    jobs: list[Job]
    """Newest first. Ends before `limit` where the texts are very long; continue with `before` set to the last id."""


class JobBriefList(msgspec.Struct, kw_only=True):
    """The answer to `texts=false`."""

    jobs: list[JobBrief]
    """Newest first."""


class Cancelled(msgspec.Struct, kw_only=True):
    ok: bool
    cancelled: int
    """The number of jobs that this request cancelled."""
