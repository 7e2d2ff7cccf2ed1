"""Prompts and workers for tests of the record."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import Connection

from llamalith_app.contracts.conversations import Message
from llamalith_app.contracts.jobs import JobRequest
from llamalith_app.store import turns, workers
from llamalith_app.store.jobs import submission, transitions
from llamalith_app.store.tables import Outcome, Source, Status
from llamalith_app.store.users import ADMIN_ID

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)


def prompt(
    content: str = "hello",
    conversation_id: str | None = "c",
    *,
    owner_id: int = ADMIN_ID,
    context: str = "",
    inputs: Sequence[Message] | None = None,
    unenforced: Sequence[str] = (),
    source: Source | None = None,
    **fields: Any,
) -> submission.NewJob:
    """`inputs` replaces context and content; `fields` are those of JobRequest."""
    if inputs is None:
        messages = (("assistant", context), ("user", content))
        inputs = [Message(role=role, content=text) for role, text in messages if text]
    return submission.NewJob(
        owner_id=owner_id,
        request_id="r",
        request=msgspec.structs.replace(JobRequest(model="m", system_prompt="", max_attempts=3), **fields),
        inputs=inputs,
        conversation_id=conversation_id,
        unenforced=unenforced,
        source=source,
    )


def register_worker(connection: Connection, lock_path: str = "") -> int:
    return workers.register(connection, host="here", pid=1, lock_path=lock_path, models=["m"], n_slots=1, now=NOW)


def finish(
    connection: Connection,
    claim: transitions.Claim,
    reply: str = "a reply",
    *,
    reply_to: turns.ReplyTo | None = None,
    thinking: str = "",
    thinking_s: float | None = None,
    times: transitions.AttemptTimes = transitions.UNKNOWN_TIMES,
) -> bool:
    return transitions.finish(
        connection,
        claim.job_id,
        claim.lease_token,
        NOW,
        reply_to=reply_to or turns.read_turn(connection, claim.turn_id, 0).reply_to,
        reply=reply,
        thinking=thinking,
        thinking_s=thinking_s,
        times=times,
        finish_reason="stop",
        prompt_tokens=1,
        prompt_tokens_reused=0,
        completion_tokens=1,
        omitted_messages=0,
    )


def fail(
    connection: Connection,
    claim: transitions.Claim,
    *,
    outcome: Outcome = Outcome.FAILED,
    kind: str = "engine_died",
    reason: str = "killed",
    pause: timedelta | None = timedelta(0),
    seen_heartbeat: int | None = None,
) -> Status | None:
    return transitions.fail(
        connection,
        claim.job_id,
        claim.lease_token,
        NOW,
        outcome=outcome,
        kind=kind,
        reason=reason,
        pause=pause,
        seen_heartbeat=seen_heartbeat,
    )
