"""The tables, and those invariants that the database itself can enforce.

Owns the schema; the migrations under `migrations/` are generated from it. Only the other modules of `store/` write
rows, each those of its own tables. A column whose docstring names no later change is set when its row is inserted.

Turns are a tree: each has a parent, the turn that it continues. A job reads the path from its turn up to the root. The
jobs of a conversation run one after another, in the order in which they were accepted, on whatever branch they are.
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
    """The original's statuses, and `cancelled`."""

    QUEUED = "queued"
    PROCESSING = "processing"
    DONE = "done"
    ERROR = "error"
    CANCELLED = "cancelled"


class Priority(IntEnum):
    """The priority classes of jobs. Lower values go first; the names in lower case are the words on the wire."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2


class Outcome(StrEnum):
    """How one attempt ended. `failed` and `lost` count against the job's `max_attempts`, the others do not."""

    DONE = "done"
    FAILED = "failed"
    LOST = "lost"
    CANCELLED = "cancelled"
    RELEASED = "released"


class Source(StrEnum):
    """Which door made a conversation."""

    PAGE = "page"
    API = "api"
    LEGACY = "legacy"
    IMPORT = "import"
    V1 = "v1"
    """An OpenAI client."""
    TITLE = "title"
    """The product itself, to ask for another conversation's title: no list shows it."""


class RecordRow(DefaultBase):
    """The record itself; the table has one row."""

    __tablename__ = "record"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    """Random; replaced when a copy is restored. Two records with the same job ids may use one Redis."""


class UserRow(DefaultBase):
    """An owner of conversations and jobs. The first is the admin, inserted by the first migration."""

    __tablename__ = "users"
    __table_args__ = ({"sqlite_autoincrement": True},)

    id: Mapped[int] = mapped_column(BigIntIdentity, primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    role: Mapped[str] = mapped_column(String(20))
    created_at: Mapped[datetime] = mapped_column(DateTimeUTC)


class ConversationRow(DefaultBase):
    """Jobs that run one after another, and their turns."""

    __tablename__ = "conversations"
    __table_args__ = (
        UniqueConstraint("id", "owner_id", name="conversation_with_owner"),
        CheckConstraint("title_by IN ('auto','person')", name="title_by_known"),
        CheckConstraint("title_by <> 'person' OR title IS NOT NULL", name="title_of_person"),
        Index(
            "public_id_of_owner",
            "owner_id",
            "public_id",
            unique=True,
            sqlite_where=text("deleted_at IS NULL"),
            postgresql_where=text("deleted_at IS NULL"),
        ),
        Index(
            "deleted_conversations",
            "deleted_at",
            sqlite_where=text("deleted_at IS NOT NULL"),
            postgresql_where=text("deleted_at IS NOT NULL"),
        ),
        Index(
            "pinned_conversations",
            "owner_id",
            "pinned_at",
            sqlite_where=text("pinned_at IS NOT NULL"),
            postgresql_where=text("pinned_at IS NOT NULL"),
        ),
        Index(
            "archived_conversations",
            "owner_id",
            "archived_at",
            sqlite_where=text("archived_at IS NOT NULL"),
            postgresql_where=text("archived_at IS NOT NULL"),
        ),
        Index(
            "conversations_without_title",
            "source",
            "created_at",
            sqlite_where=text("title_by IS NULL"),
            postgresql_where=text("title_by IS NULL"),
        ),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(BigIntIdentity, primary_key=True)
    owner_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    public_id: Mapped[str] = mapped_column(String(200))
    """The id that clients use, chosen by them or a UUID. Unique per owner among those that are not deleted."""
    title: Mapped[str | None] = mapped_column(Text)
    """Set by people and by the job that makes titles. Null: none yet; lists then show the first words of the prompt."""
    title_by: Mapped[str | None] = mapped_column(String(10))
    """`person`: a person set the title; `auto`: a job was asked for it, once. Null: neither."""
    source: Mapped[str | None] = mapped_column(String(20))
    """A value of Source. Null: made before this column existed."""
    head_turn_id: Mapped[int | None] = mapped_column(
        ForeignKey("turns.id", name="head_of_conversation", use_alter=True), index=True
    )
    """The turn that the next prompt continues; its path is what people see. Set by each new turn, and when another
    branch is selected or the turn is deleted. Null only within the transactions that make or delete the conversation.
    """
    created_at: Mapped[datetime] = mapped_column(DateTimeUTC)
    pinned_at: Mapped[datetime | None] = mapped_column(DateTimeUTC)
    """Set and cleared by people, as the two below. Null: not pinned."""
    archived_at: Mapped[datetime | None] = mapped_column(DateTimeUTC)
    deleted_at: Mapped[datetime | None] = mapped_column(DateTimeUTC)
    """Since then nothing reads it any more; it can be restored until `store/retention.py` deletes its rows."""


class ConversationTagRow(DefaultBase):
    """A tag of a conversation, set and removed by people."""

    __tablename__ = "conversation_tags"
    __table_args__ = (Index("conversations_by_tag", "tag"),)

    conversation_id: Mapped[int] = mapped_column(ForeignKey("conversations.id"), primary_key=True)
    tag: Mapped[str] = mapped_column(String(50), primary_key=True)


class TurnRow(DefaultBase):
    """The input messages of one job, followed by its reply. A turn without a job holds at most a system message; where
    it holds nothing it is, or was, the head of its conversation."""

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
    """The previous turn on its path, at the start of a fork one of another conversation of the same owner. Null: it is
    the first, or all turns before it have expired. Retention replaces a deleted parent by the parent of that."""
    depth: Mapped[int] = mapped_column(Integer)
    """Its number on its path, 0 for the first; never changes, so the numbers of expired turns are missing. Stored as
    the number that pages of a conversation are asked for by."""
    system_turn_id: Mapped[int | None] = mapped_column(ForeignKey("turns.id"), index=True)
    """The nearest turn on the path, this one included, that begins with a system message, which is in force here. Null:
    none is. Stored because each prompt with a system message is compared with it."""
    digest: Mapped[str | None] = mapped_column(String(64))
    """Of the messages that a turn after this one reads, without the system message in force, see `store/digests.py`.
    Set with the reply, null before."""
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
    """The conversation's owner; a foreign key keeps it equal. Here so that one index serves an owner's list."""
    turn_id: Mapped[int] = mapped_column(BigIntIdentity)
    """The turn that it answers. Jobs of a conversation run in the order of their ids."""
    model: Mapped[str] = mapped_column(String(100))
    system_prompt: Mapped[str] = mapped_column(Text)
    """As sent with this job; the system message in force may come from an earlier turn."""
    grammar_name: Mapped[str | None] = mapped_column(String(100))
    parameters: Mapped[str | None] = mapped_column(Text)
    """The Parameters that the client sent with this job, as JSON; null: none."""
    unenforced: Mapped[str | None] = mapped_column(Text)
    """JSON pointers to the keywords of its schema that cannot be enforced while decoding, as a JSON list; null: none.
    Determined at submit, which takes a separate process."""
    reply_valid: Mapped[bool | None] = mapped_column(Boolean)
    """Set by finish where there are such keywords: whether the reply fits the whole schema. Null: not validated."""
    reply_problem: Mapped[str | None] = mapped_column(Text)
    """Set by finish: the first part that does not fit, or why the reply could not be validated."""
    timeout_s: Mapped[float | None] = mapped_column(Float)
    """Seconds that one attempt may run; null: no limit."""
    not_after: Mapped[datetime | None] = mapped_column(DateTimeUTC)
    """Wall clock; a job whose first attempt has not started by then ends as an error. Null: no limit."""
    priority: Mapped[int] = mapped_column(Integer)
    """A value of Priority; a client may change it while the job is queued."""
    request_id: Mapped[str] = mapped_column(String(128))
    max_attempts: Mapped[int] = mapped_column(Integer)
    status: Mapped[str] = mapped_column(String(20))
    """Starts `queued`; changed by claim, finish, fail, cancel and expire. A trigger keeps a terminal one unchanged."""
    is_first_in_lane: Mapped[bool] = mapped_column("is_head", Boolean, key="is_first_in_lane")
    """Whether no earlier job of its conversation is open; set when the job before it ends, and meaningless once it has
    ended itself. Stored because a query for it would read all waiting jobs. In SQL it keeps the name `is_head`."""
    attempt: Mapped[int] = mapped_column(Integer)
    """Starts at 0; raised by claim."""
    not_before: Mapped[datetime] = mapped_column(DateTimeUTC)
    """Wall clock; starts as `created_at`. Fail sets it to the end of the backoff."""
    lease_token: Mapped[str | None] = mapped_column(String(64))
    """Random, set by each claim: only its holder may change the job while it is processing. Null in other statuses."""
    heartbeat: Mapped[int] = mapped_column(Integer)
    """Reset by claim, raised by the holder of the lease. The sweep ends a lease whose heartbeat stands still."""
    worker_id: Mapped[int | None] = mapped_column(ForeignKey("workers.id"))
    """The worker of the last claim; null before the first."""
    answers_now: Mapped[bool | None] = mapped_column(Boolean)
    """True: a person has asked that its thinking ends and its reply begins. Null: nobody did."""
    error_kind: Mapped[str | None] = mapped_column(String(40))
    """Set with the status `error`, as `error` is; its values are those of JobError."""
    error: Mapped[str | None] = mapped_column(Text)
    finish_reason: Mapped[str | None] = mapped_column(String(20))
    prompt_tokens: Mapped[int | None] = mapped_column(Integer)
    completion_tokens: Mapped[int | None] = mapped_column(Integer)
    prompt_tokens_reused: Mapped[int | None] = mapped_column(Integer)
    """Tokens of the prompt that the engine still had and did not compute again; set by finish, as the counts above."""
    thinking_tokens: Mapped[int | None] = mapped_column(Integer)
    """Of the completion tokens, those before the reply. Null: not known."""
    omitted_messages: Mapped[int] = mapped_column(Integer)
    """Earlier messages that did not fit the context; starts at 0, set by finish."""
    retry_of: Mapped[int | None] = mapped_column(BigIntIdentity)
    """The job of this conversation that this one retries; it may have expired since."""
    partial: Mapped[str | None] = mapped_column(Text)
    """The partial reply of a job that was cancelled (set soon after that) or ended as an error."""
    partial_thinking: Mapped[str | None] = mapped_column(Text)
    """What its model had thought by then, set as `partial` is."""
    created_at: Mapped[datetime] = mapped_column(DateTimeUTC)
    started_at: Mapped[datetime | None] = mapped_column(DateTimeUTC)
    """Set by each claim."""
    processed_at: Mapped[datetime | None] = mapped_column(DateTimeUTC)
    """Set with the terminal status."""


def status_is(*statuses: Status) -> ColumnElement[bool]:
    """The condition with literals, not parameters: SQLite uses a partial index for nothing else."""
    words: list[ColumnElement[str]] = [literal_column(f"'{status.value}'") for status in statuses]
    return JobRow.status == words[0] if len(words) == 1 else JobRow.status.in_(words)


class CallRow(DefaultBase):
    """A job that an OpenAI client asked for: whether the client still waits for it, and how long it is kept.
    `store/calls.py` is the only writer; retention deletes it with its job."""

    __tablename__ = "calls"
    __table_args__ = (
        Index(
            "calls_by_digest",
            "digest",
            sqlite_where=text("digest IS NOT NULL"),
            postgresql_where=text("digest IS NOT NULL"),
        ),
        Index(
            "calls_left",
            "left_at",
            sqlite_where=text("left_at IS NOT NULL"),
            postgresql_where=text("left_at IS NOT NULL"),
        ),
        Index("calls_by_age", "is_stored", "created_at"),
    )

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    digest: Mapped[str | None] = mapped_column(String(64))
    """Of the caller and the request: by it a client that comes again finds the job that it left. Null: the job goes on
    whoever leaves, and is not joined."""
    n_open: Mapped[int] = mapped_column(Integer)
    """Requests that wait for the job; starts at 1."""
    left_at: Mapped[datetime | None] = mapped_column(DateTimeUTC)
    """When the last of them left without an answer; null: none did, or another came."""
    is_stored: Mapped[bool] = mapped_column(Boolean)
    """False: the client wants nothing kept, so that the job goes soon after its end."""
    is_background: Mapped[bool] = mapped_column(Boolean)
    """The client asked for the job alone, not for its answer."""
    created_at: Mapped[datetime] = mapped_column(DateTimeUTC)


class MessageRow(DefaultBase):
    """One message of a turn; never changed, but for the prompt of a job that was not started yet."""

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
    """0 is the first of its turn; the reply is the last. A system message at 0 is in force from this turn on, until a
    later turn begins with another."""
    role: Mapped[str] = mapped_column(String(20))
    content: Mapped[str] = mapped_column(Text)
    tool_calls: Mapped[str | None] = mapped_column(Text)
    """The tool calls of an assistant's message, as a JSON list; null: none."""
    tool_call_id: Mapped[str | None] = mapped_column(Text)
    """In a tool's message: the id of the call that it answers."""
    is_reply: Mapped[bool] = mapped_column(Boolean)
    """Whether the turn's job wrote it. A client sent all other messages."""
    created_at: Mapped[datetime] = mapped_column(DateTimeUTC)
    thinking: Mapped[str | None] = mapped_column(Text)
    """What the model thought before this reply. People see it; no job reads it, and it is in no digest. Null: nothing,
    or it was written before this column existed."""
    thinking_s: Mapped[float | None] = mapped_column(Float)
    """How long it thought. Null: not known, because more than one attempt thought."""


class KeyRow(DefaultBase):
    """The answer to a request with an Idempotency-Key."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index("idempotency_keys_by_age", "created_at"),)

    owner_id: Mapped[int] = mapped_column(ForeignKey("users.id"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    """The digest of the request."""
    answer: Mapped[str] = mapped_column(Text)
    """As JSON."""
    created_at: Mapped[datetime] = mapped_column(DateTimeUTC)


class AttemptRow(DefaultBase):
    """One start of a job by one worker: inserted by claim, closed by the transition that ends its lease."""

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
    """Null while it runs; set with the columns below when the lease ends."""
    outcome: Mapped[str | None] = mapped_column(String(20))
    """An Outcome."""
    kind: Mapped[str | None] = mapped_column(String(40))
    """Why it did not finish, as in JobError; null: it did, or it ended before this column existed."""
    reason: Mapped[str | None] = mapped_column(Text)
    loaded_at: Mapped[datetime | None] = mapped_column(DateTimeUTC)
    """When its model was ready. This and the two below come from its worker with the write that ends the attempt, or
    with a heartbeat before that. Null: it did not come so far, or it ran before these columns existed."""
    prompt_read_at: Mapped[datetime | None] = mapped_column(DateTimeUTC)
    first_token_at: Mapped[datetime | None] = mapped_column(DateTimeUTC)


class WorkerRow(DefaultBase):
    """A worker process, alive or ended. Says without Redis which workers there are."""

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
    """A file that the process holds locked while it lives: if another process can lock it, the worker is gone."""
    models: Mapped[str] = mapped_column(Text)
    """The names of the models that it serves, as a JSON list."""
    n_slots: Mapped[int] = mapped_column(Integer)
    engines: Mapped[str | None] = mapped_column(Text)
    """A JSON list of EngineStatus, set by each heartbeat; null before the first."""
    heartbeat: Mapped[int] = mapped_column(Integer)
    """Starts at 0; raised by each heartbeat."""
    started_at: Mapped[datetime] = mapped_column(DateTimeUTC)
    seen_at: Mapped[datetime] = mapped_column(DateTimeUTC)
    """Wall clock of the last heartbeat; for people and /readyz, never for ending a lease."""
    ended_at: Mapped[datetime | None] = mapped_column(DateTimeUTC)
    """Set by the worker at its end; else by another one's sweep, or by a restore."""


class SessionRow(DefaultBase):
    """One logged-in browser. It ends by age, by logout, or when a secret that the digest depends on changes."""

    __tablename__ = "sessions"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    """The digest of the token in the browser's cookie; the token is stored nowhere."""
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    created_at: Mapped[datetime] = mapped_column(DateTimeUTC)
    seen_at: Mapped[datetime] = mapped_column(DateTimeUTC)
    """When the session was last used, to 5 minutes; starts as `created_at`."""


class LoginFailuresRow(DefaultBase):
    """Recent failed logins, and those being checked, counted for one address under one Host or for all addresses."""

    __tablename__ = "login_failures"
    __table_args__ = (Index("login_failures_by_age", "last_at"),)

    address: Mapped[str] = mapped_column(String(64), primary_key=True)
    """The address, then `#` and the Host where that is a name; nothing after the `#`: all further Hosts. Empty: all
    addresses. `+` and a Host: a login has succeeded under that Host; this row counts no failures."""
    n_failures: Mapped[int] = mapped_column(Integer)
    """Raised before a password is checked, lowered after the right one."""
    last_at: Mapped[datetime] = mapped_column(DateTimeUTC)
