"""The rows, and what of the invariants the database itself can hold.

Owns the shape of the database; the migrations under `migrations/` are made from it. Only the modules beside
this one write rows, each its own aggregate.

Turns are a tree: each has a parent, the turn that it goes on from. What a job reads is the path from its turn up to the
root. A conversation is a line of jobs, which run in the order in which they were accepted, whatever branch they are on.
"""

from __future__ import annotations

from datetime import datetime
from enum import IntEnum, StrEnum

from advanced_alchemy.base import DefaultBase
from advanced_alchemy.types import BigIntIdentity, DateTimeUTC
from sqlalchemy import (
    Boolean,
    CheckConstraint,
    ColumnElement,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    String,
    Text,
    UniqueConstraint,
    literal_column,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column


class Status(StrEnum):
    """The words of the original, and `cancelled`."""

    QUEUED = "queued"
    PROCESSING = "processing"
    DONE = "done"
    ERROR = "error"
    CANCELLED = "cancelled"


class Priority(IntEnum):
    """The classes of jobs; their names in lower case are the words on the wire. Lower goes first."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2


class Outcome(StrEnum):
    """How one attempt ended; `failed` and `lost` spend one of the job's attempts, the others do not."""

    DONE = "done"
    FAILED = "failed"
    LOST = "lost"
    CANCELLED = "cancelled"
    RELEASED = "released"


class RecordRow(DefaultBase):
    """One row."""

    __tablename__ = "record"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    """Random, anew for a restored copy: two records may use one Redis, where their jobs have the same ids."""


class UserRow(DefaultBase):
    """Who owns conversations and jobs; the first is the admin, made by the first migration."""

    __tablename__ = "users"
    __table_args__ = ({"sqlite_autoincrement": True},)

    id: Mapped[int] = mapped_column(BigIntIdentity, primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    role: Mapped[str] = mapped_column(String(20))
    created_at: Mapped[datetime] = mapped_column(DateTimeUTC)


class ConversationRow(DefaultBase):
    __tablename__ = "conversations"
    __table_args__ = (
        UniqueConstraint("owner_id", "public_id", name="public_id_of_owner"),
        UniqueConstraint("id", "owner_id", name="conversation_with_owner"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(BigIntIdentity, primary_key=True)
    owner_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    public_id: Mapped[str] = mapped_column(String(200))
    """The id that clients use: chosen by them or a UUID; unique for an owner only."""
    title: Mapped[str | None] = mapped_column(Text)
    head_turn_id: Mapped[int | None] = mapped_column(
        ForeignKey("turns.id", name="head_of_conversation", use_alter=True), index=True
    )
    """The newest turn of the branch that people see and that the next prompt goes on from. Null only within the
    transaction that makes the conversation."""
    created_at: Mapped[datetime] = mapped_column(DateTimeUTC)


class TurnRow(DefaultBase):
    """What one job reads and writes: its input messages, and then its reply. A turn without a job holds only a system
    message."""

    __tablename__ = "turns"
    __table_args__ = (
        UniqueConstraint("conversation_id", "id", name="turn_with_conversation"),
        Index(
            "turns_by_digest",
            "digest",
            sqlite_where=text("digest IS NOT NULL"),
            postgresql_where=text("digest IS NOT NULL"),
        ),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(BigIntIdentity, primary_key=True)
    conversation_id: Mapped[int] = mapped_column(ForeignKey("conversations.id"))
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("turns.id"), index=True)
    """The turn before it on its path; of another conversation of the same owner where a fork begins. Null: it is the
    first, or all before it has expired."""
    depth: Mapped[int] = mapped_column(Integer)
    """Its number on its path, 0 for the first. Stored so that a page of a long path needs no walk to the root; numbers
    of turns that expired are missing."""
    system_turn_id: Mapped[int | None] = mapped_column(ForeignKey("turns.id"), index=True)
    """The nearest turn up the path, this one included, that begins with a system message: that message is in force.
    Null: none is. Stored since each prompt that brings a system message is compared with it."""
    digest: Mapped[str | None] = mapped_column(String(64))
    """Of all that a turn behind this one would read, see `store/digests.py`. Null: it has no reply."""
    created_at: Mapped[datetime] = mapped_column(DateTimeUTC)


class JobRow(DefaultBase):
    """One request for a reply. The modules of `store/jobs/` are its only writers."""

    __tablename__ = "jobs"
    __table_args__ = (
        ForeignKeyConstraint(["conversation_id", "owner_id"], ["conversations.id", "conversations.owner_id"]),
        ForeignKeyConstraint(["conversation_id", "turn_id"], ["turns.conversation_id", "turns.id"]),
        UniqueConstraint("turn_id", name="one_job_a_turn"),
        UniqueConstraint("conversation_id", "id", name="job_with_conversation"),
        CheckConstraint("status IN ('queued','processing','done','error','cancelled')", name="status_known"),
        CheckConstraint("(status = 'processing') = (lease_token IS NOT NULL)", name="lease_while_processing"),
        CheckConstraint(
            "(status IN ('done','error','cancelled')) = (processed_at IS NOT NULL)",
            name="ended_when_terminal",
        ),
        CheckConstraint("(status = 'error') = (error IS NOT NULL)", name="error_has_reason"),
        CheckConstraint("attempt >= 0 AND heartbeat >= 0 AND max_attempts >= 1", name="counts"),
        Index(
            "one_processing",
            "conversation_id",
            unique=True,
            sqlite_where=text("status = 'processing'"),
            postgresql_where=text("status = 'processing'"),
        ),
        Index(
            "due",
            "model",
            "priority",
            "id",
            sqlite_where=text("status = 'queued'"),
            postgresql_where=text("status = 'queued'"),
        ),
        Index(
            "heads",
            "model",
            "priority",
            "id",
            sqlite_where=text("status = 'queued' AND is_head = 1"),
            postgresql_where=text("status = 'queued' AND is_head"),
        ),
        Index(
            "open_by_conversation",
            "conversation_id",
            "id",
            sqlite_where=text("status IN ('queued','processing')"),
            postgresql_where=text("status IN ('queued','processing')"),
        ),
        # For the foreign key: when a conversation is deleted, SQLite would go through all jobs of its owner.
        Index("jobs_of_conversation", "conversation_id", "owner_id"),
        Index("jobs_of_owner", "owner_id", "id"),
        Index("jobs_of_owner_by_status", "owner_id", "status", "id"),
        Index(
            "given_up_in_the_queue",
            "not_after",
            sqlite_where=text("status = 'queued' AND not_after IS NOT NULL"),
            postgresql_where=text("status = 'queued' AND not_after IS NOT NULL"),
        ),
        Index(
            "ended_by_age",
            "processed_at",
            sqlite_where=text("processed_at IS NOT NULL"),
            postgresql_where=text("processed_at IS NOT NULL"),
        ),
        Index(
            "one_retry_a_job",
            "retry_of",
            unique=True,
            sqlite_where=text("retry_of IS NOT NULL"),
            postgresql_where=text("retry_of IS NOT NULL"),
        ),
        Index(
            "held_by_worker",
            "worker_id",
            sqlite_where=text("status = 'processing'"),
            postgresql_where=text("status = 'processing'"),
        ),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(BigIntIdentity, primary_key=True)
    conversation_id: Mapped[int] = mapped_column(BigIntIdentity)
    owner_id: Mapped[int] = mapped_column(BigIntIdentity)
    """The conversation's owner, held equal by the foreign key; here so that an owner's list needs one index."""
    turn_id: Mapped[int] = mapped_column(BigIntIdentity)
    """The turn that it reads and writes. Jobs of a conversation run in the order of their ids."""
    model: Mapped[str] = mapped_column(String(100))
    system_prompt: Mapped[str] = mapped_column(Text)
    """As sent with this job; the system message in force may come from an earlier turn."""
    grammar_name: Mapped[str | None] = mapped_column(String(100))
    parameters: Mapped[str | None] = mapped_column(Text)
    """What this job says itself of how its reply is drawn, as JSON; null: nothing."""
    unenforced: Mapped[str | None] = mapped_column(Text)
    """JSON pointers to the keywords of its schema that no reply can be held to while it is written, as a JSON list;
    null: none. Found out at submit, since that takes a process of its own."""
    reply_valid: Mapped[bool | None] = mapped_column(Boolean)
    """Of a job that is done and has such keywords: its reply fits all of the schema. Null: it was not validated."""
    reply_problem: Mapped[str | None] = mapped_column(Text)
    """The first thing that does not fit, or why it could not be validated."""
    timeout_s: Mapped[float | None] = mapped_column(Float)
    """Seconds that one attempt may run; null: as long as it takes."""
    not_after: Mapped[datetime | None] = mapped_column(DateTimeUTC)
    """Wall clock; if it was not started by then, it ends as an error. Null: it waits as long as it takes."""
    priority: Mapped[int] = mapped_column(Integer)
    """A Priority."""
    request_id: Mapped[str] = mapped_column(String(128))
    max_attempts: Mapped[int] = mapped_column(Integer)
    status: Mapped[str] = mapped_column(String(20))
    """Starts `queued`; changed by claim, finish, fail and cancel; a terminal one never changes (a trigger)."""
    is_head: Mapped[bool] = mapped_column(Boolean)
    """Nothing earlier in its conversation is open. Stored, since who looks for it reads all that waits behind something
    or all conversations that wait; kept by whatever ends a job, and of no meaning once this one has ended."""
    attempt: Mapped[int] = mapped_column(Integer)
    """Claims so far; raised by claim."""
    not_before: Mapped[datetime] = mapped_column(DateTimeUTC)
    """Wall clock; set into the future by fail for its pause."""
    lease_token: Mapped[str | None] = mapped_column(String(64))
    """Random, new at each claim: who may write this job while it is processing."""
    heartbeat: Mapped[int] = mapped_column(Integer)
    """Raised by the holder of the lease; a sweeper that sees it stand still takes the lease away."""
    worker_id: Mapped[int | None] = mapped_column(ForeignKey("workers.id"))
    """Who claimed it last."""
    error_kind: Mapped[str | None] = mapped_column(String(40))
    error: Mapped[str | None] = mapped_column(Text)
    finish_reason: Mapped[str | None] = mapped_column(String(20))
    prompt_tokens: Mapped[int | None] = mapped_column(Integer)
    completion_tokens: Mapped[int | None] = mapped_column(Integer)
    prompt_tokens_reused: Mapped[int | None] = mapped_column(Integer)
    """Of the prompt's tokens, those that stood in the engine already and were not computed again."""
    omitted_messages: Mapped[int] = mapped_column(Integer)
    """Earlier messages that did not fit the context when the reply was made."""
    retry_of: Mapped[int | None] = mapped_column(BigIntIdentity)
    """The job of this conversation that ended without a reply and that this one tries again; it may be gone by now."""
    partial: Mapped[str | None] = mapped_column(Text)
    """What was written of the reply of a job that was cancelled or ran out of time."""
    created_at: Mapped[datetime] = mapped_column(DateTimeUTC)
    started_at: Mapped[datetime | None] = mapped_column(DateTimeUTC)
    """Of the last claim."""
    processed_at: Mapped[datetime | None] = mapped_column(DateTimeUTC)


def status_is(*statuses: Status) -> ColumnElement[bool]:
    """Literals, not parameters: SQLite matches a partial index to nothing else."""
    words: list[ColumnElement[str]] = [literal_column(f"'{status.value}'") for status in statuses]
    return JobRow.status == words[0] if len(words) == 1 else JobRow.status.in_(words)


class MessageRow(DefaultBase):
    __tablename__ = "messages"
    __table_args__ = (
        CheckConstraint("role IN ('system','user','assistant','tool')", name="role_known"),
        CheckConstraint("role = 'assistant' OR NOT is_reply", name="reply_by_the_assistant"),
        CheckConstraint("position >= 0", name="position_counts"),
        Index(
            "one_reply_a_turn",
            "turn_id",
            unique=True,
            sqlite_where=text("is_reply = 1"),
            postgresql_where=text("is_reply"),
        ),
    )

    turn_id: Mapped[int] = mapped_column(ForeignKey("turns.id"), primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True)
    """0 is the first of its turn; the reply is the last. A system message at 0 is in force from here on, until
    another turn begins with one."""
    role: Mapped[str] = mapped_column(String(20))
    content: Mapped[str] = mapped_column(Text)
    tool_calls: Mapped[str | None] = mapped_column(Text)
    """Of an assistant's message, as a JSON list; null: none."""
    tool_call_id: Mapped[str | None] = mapped_column(Text)
    """Of a tool's message: the call that this is the result of."""
    is_reply: Mapped[bool] = mapped_column(Boolean)
    """The turn's job wrote it; all others were sent in."""
    created_at: Mapped[datetime] = mapped_column(DateTimeUTC)


class KeyRow(DefaultBase):
    """What a request with an Idempotency-Key was answered."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index("idempotency_keys_by_age", "created_at"),)

    owner_id: Mapped[int] = mapped_column(ForeignKey("users.id"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    """Of the request."""
    answer: Mapped[str] = mapped_column(Text)
    """JSON."""
    created_at: Mapped[datetime] = mapped_column(DateTimeUTC)


class AttemptRow(DefaultBase):
    """One try by one worker: opened by claim, closed by whoever ends the lease."""

    __tablename__ = "attempts"
    __table_args__ = (
        CheckConstraint("(outcome IS NULL) = (ended_at IS NULL)", name="outcome_when_ended"),
        CheckConstraint("outcome IN ('done','failed','lost','cancelled','released')", name="outcome_known"),
    )

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True)
    worker_id: Mapped[int] = mapped_column(ForeignKey("workers.id"))
    lease_token: Mapped[str] = mapped_column(String(64), unique=True)
    started_at: Mapped[datetime] = mapped_column(DateTimeUTC)
    ended_at: Mapped[datetime | None] = mapped_column(DateTimeUTC)
    outcome: Mapped[str | None] = mapped_column(String(20))
    kind: Mapped[str | None] = mapped_column(String(40))
    """Of what went wrong, as a JobError's; null: nothing did, or it ended before this was kept."""
    reason: Mapped[str | None] = mapped_column(Text)


class WorkerRow(DefaultBase):
    """A worker process, alive or gone; says who is there without Redis."""

    __tablename__ = "workers"
    __table_args__ = (
        Index(
            "workers_alive",
            "seen_at",
            sqlite_where=text("ended_at IS NULL"),
            postgresql_where=text("ended_at IS NULL"),
        ),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(BigIntIdentity, primary_key=True)
    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int] = mapped_column(Integer)
    lock_path: Mapped[str] = mapped_column(Text)
    """A file that the process holds locked while it lives: whoever can lock it knows that it is gone."""
    models: Mapped[str] = mapped_column(Text)
    """Names it serves, as a JSON list."""
    n_slots: Mapped[int] = mapped_column(Integer)
    engines: Mapped[str | None] = mapped_column(Text)
    """What it told of its engines with its last heartbeat, as JSON; null: nothing yet."""
    heartbeat: Mapped[int] = mapped_column(Integer)
    started_at: Mapped[datetime] = mapped_column(DateTimeUTC)
    seen_at: Mapped[datetime] = mapped_column(DateTimeUTC)
    """Wall clock of the last heartbeat; for people and /readyz, never for taking a lease away."""
    ended_at: Mapped[datetime | None] = mapped_column(DateTimeUTC)


class SessionRow(DefaultBase):
    """One logged-in browser. Its end is derived from its two times and from the secrets behind the digest."""

    __tablename__ = "sessions"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    """Of the token in the browser's cookie, which is stored nowhere."""
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    created_at: Mapped[datetime] = mapped_column(DateTimeUTC)
    seen_at: Mapped[datetime] = mapped_column(DateTimeUTC)
    """When its person last did something, to some minutes."""


class LoginFailuresRow(DefaultBase):
    """Wrong passwords lately, and those being checked just now: of one address under one Host, or of all together."""

    __tablename__ = "login_failures"
    __table_args__ = (Index("login_failures_by_age", "last_at"),)

    address: Mapped[str] = mapped_column(String(64), primary_key=True)
    """Behind a `#` the Host, where that is a name; nothing behind it: all further ones. Empty: all together.
    Behind a `+`: a Host under which a login has succeeded, without failures."""
    n_failures: Mapped[int] = mapped_column(Integer)
    last_at: Mapped[datetime] = mapped_column(DateTimeUTC)
