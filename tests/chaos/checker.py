"""Compares the clients' history with the database. Each rule is a promise, and yields what breaks it.

Pure. It shares no code with the product, and computes by itself what the fake engine must have answered.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from tests.chaos.history import History, Operation
from tests.chaos.record import TERMINAL, Entry, Job, Message, Record


class Violation(NamedTuple):
    rule: str
    what: str


def accepted_is_on_disk(history: History, record: Record) -> Iterator[str]:
    """I1: every submit that was answered 2xx has its job, with its prompt and in its conversation."""
    for operation in _answered(history, "submit"):
        job = record.jobs.get(operation.job_id or 0)
        if job is None:
            yield f"job {operation.job_id} is not there: {operation}"
        elif (job.content, job.public_id, job.model) != (
            operation.content,
            operation.conversation_id,
            operation.model,
        ):
            yield f"{job} is not what was asked for: {operation}"


def retries_try_again(history: History, record: Record) -> Iterator[str]:
    """I1: every retry that was answered 2xx has its job, a copy of the one that it retries."""
    for operation in _answered(history, "retry"):
        job, before = record.jobs.get(operation.job_id or 0), record.jobs.get(operation.subject or 0)
        if job is None or before is None or job.retry_of != before.id:
            yield f"{job} does not try {before} again: {operation}"
        elif (job.content, job.public_id, job.model) != (before.content, before.public_id, before.model):
            yield f"{job} is no copy of {before}"


def everything_ends(history: History, record: Record) -> Iterator[str]:
    """I2: every job is in a terminal state once everything runs again."""
    for job in record.jobs.values():
        if job.status not in TERMINAL:
            yield f"{job}"


def an_end_is_final(history: History, record: Record) -> Iterator[str]:
    """I3: a terminal state never changes, neither on disk nor for any reader."""
    ended: dict[int, str | None] = {}
    for entry in record.journal:
        if entry.what == "status":
            if entry.job_id in ended:
                yield f"job {entry.job_id} was {ended[entry.job_id]} and became {entry.word}"
            if entry.word in TERMINAL:
                ended[entry.job_id] = entry.word
    results = {message.job_id: message.content for message in record.messages if message.role == "assistant"}
    for sighting in history.sightings:
        job = record.jobs.get(sighting.job_id)
        if job is None or job.status != sighting.status:
            yield f"{sighting} is {job} at the end"
        elif sighting.status == "done" and sighting.result != results.get(job.id):
            yield f"{sighting} has {results.get(job.id)!r} at the end"


def done_means_one_reply(history: History, record: Record) -> Iterator[str]:
    """I4: a done job has exactly one reply, in the place behind its prompt; any other job has none."""
    replies = defaultdict(list)
    for message in record.messages:
        if message.role == "assistant" and message.job_id is not None:
            replies[message.job_id].append(message)
    for job in record.jobs.values():
        found = replies[job.id]
        if len(found) != (job.status == "done"):
            yield f"{job} has {len(found)} replies: {found}"
        elif found and (found[0].conversation, found[0].place) != (job.conversation, 4 * job.turn + 3):
            yield f"the reply to {job} stands elsewhere: {found[0]}"


def order_is_kept(history: History, record: Record) -> Iterator[str]:
    """I5: if a prompt was sent after the answer to another one, it comes after that one in the conversation."""
    by_conversation = defaultdict(list)
    for operation in _answered(history, "submit"):
        by_conversation[operation.conversation_id].append(operation)
    for operations in by_conversation.values():
        for before in operations:
            for after in operations:
                if before.ended is not None and before.ended < after.invoked:
                    first, second = record.jobs.get(before.job_id or 0), record.jobs.get(after.job_id or 0)
                    if first and second and not (first.turn, first.id) < (second.turn, second.id):
                        yield f"{second} was sent after {first} was accepted, and stands before it"


def replies_are_to_their_own_prompt(history: History, record: Record, *, fake_models: frozenset[str]) -> Iterator[str]:
    """I6: a reply of the fake engine is the digest of exactly the messages that its job had to read."""
    status_of_turn = {(job.conversation, job.turn): job.status for job in record.jobs.values()}
    for conversation, messages in _by_conversation(record):
        replies = {message.place: message.content for message in messages if message.place % 4 == 3}
        jobs = [job for job in record.jobs.values() if job.conversation == conversation]
        for job in jobs:
            if job.status != "done" or job.model not in fake_models:
                continue
            wanted = expected(messages, job, status_of_turn)
            if (found := replies.get(4 * job.turn + 3)) != wanted:
                yield f"{job} was answered {found!r}; its own conversation would be answered {wanted!r}"


def expected(messages: list[Message], job: Job, status_of_turn: dict[tuple[int, int], str]) -> str:
    """The reply that the fake engine must give: the digest of the earlier turns that are done or have no job."""
    seen = [
        message
        for message in messages
        if message.place <= 4 * job.turn + 2
        and (
            message.place >= 4 * job.turn
            or status_of_turn.get((job.conversation, message.place // 4), "done") == "done"
            or message.role == "system"
        )
    ]
    systems = [message for message in seen if message.role == "system"]
    rest = [message for message in seen if message.role != "system"][job.omitted_messages :]
    text = "".join(f"<{one.role}>{one.content}</{one.role}>" for one in [*systems[-1:], *rest])
    return hashlib.sha256(text.encode()).hexdigest()


def one_at_a_time(history: History, record: Record) -> Iterator[str]:
    """I7: a conversation has one attempt at a time, and no attempt is opened or closed twice."""
    opened: dict[int, Entry] = {}
    for entry in record.journal:
        job = record.jobs.get(entry.job_id)
        if job is None or entry.what == "status":
            continue
        running = opened.get(job.conversation)
        if entry.what == "opened":
            if running is not None:
                yield f"{entry} began in conversation {job.public_id} while {running} ran"
            opened[job.conversation] = entry
        elif running is None or running.lease_token != entry.lease_token:
            yield f"{entry} ended in conversation {job.public_id}, where {running} ran"
        else:
            del opened[job.conversation]


def a_cancel_is_final(history: History, record: Record) -> Iterator[str]:
    """I8: a job whose cancel was answered `cancelled` stays so; any other answer is a terminal state too."""
    for operation in _answered(history, "cancel"):
        job = record.jobs.get(operation.subject or 0)
        if operation.word not in TERMINAL:
            yield f"a cancel was answered {operation.word}: {operation}"
        elif job is None or job.status != operation.word:
            yield f"{job} is not {operation.word}: {operation}"


def attempts_are_counted(history: History, record: Record) -> Iterator[str]:
    """I9: every attempt has a lease of its own, and a job has at most `max_attempts` failed or lost attempts."""
    for token, n in Counter(attempt.lease_token for attempt in record.attempts).items():
        if n > 1:
            yield f"{n} attempts under lease {token}"
    spent = Counter(attempt.job_id for attempt in record.attempts if attempt.outcome in ("failed", "lost"))
    for job in record.jobs.values():
        if spent[job.id] > job.max_attempts:
            yield f"{job} spent {spent[job.id]} attempts"


def a_key_makes_one_job(history: History, record: Record) -> Iterator[str]:
    """I10: all answers under one Idempotency-Key name the same job."""
    for operation in history.operations:
        if len(set(operation.job_ids)) > 1:
            yield f"different jobs: {operation}"


def streams_tell_what_is_stored(history: History, record: Record) -> Iterator[str]:
    """I13: a reader that saw a stream's last event has exactly the stored reply."""
    results = {message.job_id: message.content for message in record.messages if message.role == "assistant"}
    for heard in history.heard:
        job = record.jobs.get(heard.job_id)
        if heard.broken is not None:
            yield f"{heard.broken}: {heard}"
        elif heard.final is None:
            yield f"it never ended: {heard}"
        elif job is None or heard.final != job.status:
            yield f"{heard} of {job}"
        elif heard.final == "done" and heard.text != results.get(job.id):
            yield f"{heard} of a reply that is {results.get(job.id)!r}"


def lanes_are_whole(history: History, record: Record) -> Iterator[str]:
    """I13: a conversation's stream shows its jobs in order, and omits none that was open or came later."""
    for lane in history.lanes:
        first, last = record.jobs.get(lane.job_ids[0]), lane.job_ids[-1]
        missed = [
            job.id
            for job in record.jobs.values()
            if first is not None
            and (job.conversation == first.conversation and first.id <= job.id <= last and job.id not in lane.job_ids)
            and (job.processed_at is None or job.processed_at > lane.since)
        ]
        if missed or lane.job_ids != sorted(lane.job_ids):
            yield f"{missed} are missing or the order is wrong: {lane}"


def what_is_unknown_happened_once_at_most(history: History, record: Record) -> Iterator[str]:
    """I14: a submit makes one job if it was answered, else at most one; every job has a submit or a retry."""
    made = Counter(job.content for job in record.jobs.values() if job.retry_of is None)
    sent = {operation.content: operation for operation in history.operations if operation.kind == "submit"}
    for content, n in made.items():
        if content not in sent:
            yield f"{n} jobs for a prompt that nobody sent: {content!r}"
        elif n > 1:
            yield f"{n} jobs: {sent[content]}"
    tried_again = Counter(job.retry_of for job in record.jobs.values() if job.retry_of is not None)
    for job_id, n in tried_again.items():
        if n > 1:
            yield f"job {job_id} is tried again by {n} jobs"


def everybody_is_answered(history: History, record: Record) -> Iterator[str]:
    """Everybody: no valid request is refused, and every request is answered once everything runs again."""
    for operation in history.operations:
        if operation.outcome == "fail":
            yield f"refused: {operation}"
        elif operation.outcome == "open":
            yield f"not answered: {operation}"


Rule = Callable[[History, Record], Iterator[str]]


def check(history: History, record: Record, *, fake_models: frozenset[str]) -> list[Violation]:
    def answered_rightly(history: History, record: Record) -> Iterator[str]:
        return replies_are_to_their_own_prompt(history, record, fake_models=fake_models)

    answered_rightly.__doc__ = replies_are_to_their_own_prompt.__doc__
    rules: list[Rule] = [
        accepted_is_on_disk,
        retries_try_again,
        everything_ends,
        an_end_is_final,
        done_means_one_reply,
        order_is_kept,
        answered_rightly,
        one_at_a_time,
        a_cancel_is_final,
        attempts_are_counted,
        a_key_makes_one_job,
        streams_tell_what_is_stored,
        lanes_are_whole,
        what_is_unknown_happened_once_at_most,
        everybody_is_answered,
    ]
    return [Violation(rule.__doc__ or rule.__name__, what) for rule in rules for what in rule(history, record)]


def max_concurrent_attempts(record: Record) -> int:
    """The largest number of attempts that ran at the same time."""
    running, most = 0, 0
    for entry in record.journal:
        running += (entry.what == "opened") - (entry.what == "closed")
        most = max(most, running)
    return most


def _answered(history: History, kind: str) -> list[Operation]:
    return [one for one in history.operations if one.kind == kind and one.outcome == "ok"]


def _by_conversation(record: Record) -> Iterator[tuple[int, list[Message]]]:
    for conversation, messages in groupby(record.messages, attrgetter("conversation")):
        yield conversation, list(messages)
