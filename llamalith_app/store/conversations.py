"""Reads one conversation: its messages, its newest state and its jobs.

Writes nothing: `store/jobs/submission.py` makes conversations, `store/turns.py` writes their turns, and
`store/conversation_changes.py` what people change about them. Lists are in `store/conversation_list.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, bindparam, case, func, literal_column, not_, or_, select
from sqlalchemy import exists as sql_exists
from sqlalchemy.orm import aliased

from llamalith_app.contracts.conversations import Latest, Message, MessageList
from llamalith_app.contracts.jobs import Job
from llamalith_app.store import tree, turns
from llamalith_app.store.jobs import reads
from llamalith_app.store.tables import ConversationRow, JobRow, MessageRow, TurnRow


class Answer(NamedTuple):
    """One model's answer to the prompt of a turn."""

    turn_id: int
    job: Job
    is_own: bool
    """As in ThreadTurn."""


class ThreadTurn(NamedTuple):
    """One turn as a page shows it. Prompt and reply are in its job."""

    turn: int
    """Its depth on its path, 0 for the first; pages of turns are addressed by it."""
    system: str | None
    before: Sequence[Message]
    """What its client sent before the prompt, without a system prompt that begins the turn; from the third message on
    each is cut to MAX_BEFORE_CHARS. An imported turn has none."""
    job: Job | None
    """None: the turn holds only a system message, or was imported, or the job has expired."""
    imported: Sequence[Message]
    """The messages of an imported turn, which has no job, without its system prompt."""
    turn_id: int
    parent: int | None
    """Its parent's turn id; None: it begins anew, or all before it has expired."""
    is_own: bool
    """False: it belongs to a conversation from which this one was forked."""
    sibling: int
    """Its place among the turns with the same parent that this conversation holds; 1 is the oldest."""
    n_siblings: int
    """Itself included."""
    previous_sibling: int | None
    """A turn id, as the next one."""
    next_sibling: int | None
    others: Sequence[Answer] = ()
    """What other models were asked beside it with the same messages, in the order of their turns."""

    @property
    def answers(self) -> list[Answer]:
        """Its own and the others, in the order of their turns. Empty: it has no job."""
        if self.job is None:
            return []
        return sorted([Answer(self.turn_id, self.job, self.is_own), *self.others], key=lambda answer: answer.turn_id)

    @property
    def jobs(self) -> list[Job]:
        return [answer.job for answer in self.answers]


class Thread(NamedTuple):
    """Some turns of one branch of a conversation, oldest first."""

    conversation_id: int
    turns: list[ThreadTurn]
    n_earlier: int
    """Turns before these that still have messages. At most MAX_EARLIER, also where there are more."""
    earlier_until: int
    """The depth after the last of those; 0: there are none."""
    last_earlier: int | None
    """The turn id of the last of those. None: there are none."""
    until: int
    """The depth after the last of `turns`."""
    system_prompt: str
    """In force for the next turn of the branch; empty: none."""
    first_prompt: str | None
    """The first characters of the first prompt; None: no prompt yet."""
    last_turn_id: int
    """The end of the branch that these turns are part of."""
    is_head: bool
    """Whether that is the head; False: another branch has been selected, or begun, since this one was shown."""
    is_lost: bool
    """The turn `seen` is gone, so that these may be turns of another branch than the one that was shown."""

    @property
    def counts_all_earlier(self) -> bool:
        return self.n_earlier < MAX_EARLIER


MAX_EARLIER = 1000
MAX_BEFORE_CHARS = 4000
"""Earlier turns that a page counts. Counting all of a very long path would cost more than the page."""


class Lane(NamedTuple):
    """The jobs of one conversation, in the order in which they run and in which a stream of its events shows them."""

    conversation_id: int
    job_ids: list[int]
    """Ascending."""
    newest_job: int
    """The id of its newest job; 0: it has none."""


def thread(
    connection: Connection,
    owner_id: int,
    public_id: str,
    *,
    limit: int,
    max_text: int,
    first: int | None = None,
    before: int | None = None,
    last: int | None = None,
    seen: int | None = None,
) -> Thread | None:
    """At most `limit` turns: the newest, or from depth `first` on, or the last before depth `before`. `seen`: a turn
    id; the turns are those of the branch through it, whatever the head is by now. `last`: with `before`, the id of the
    last of these turns, so that the path need not be walked from its end; ignored where the conversation has no such
    turn of its own.

    None: no such conversation. `max_text`: characters of the first prompt.
    """
    found_row = connection.execute(
        select(ConversationRow.id, ConversationRow.head_turn_id).where(reads.has_public_id(owner_id, public_id))
    ).first()
    if found_row is None:
        return None
    conversation = tree.Conversation._make(found_row)
    branch = conversation.head_turn_id if seen is None else tree.branch_through(connection, conversation, seen)
    end = branch or conversation.head_turn_id
    newest = turns.parent(connection, end)
    until = newest.depth + 1 if before is None else min(before, newest.depth + 1)
    start = end
    if last is not None and before is not None:
        of_page = turns.find(connection, last)
        if of_page is not None and of_page.conversation_id == conversation.id:
            start, until = last, of_page.depth + 1
    goes_on = first is not None
    if first is None:
        first = max(until - limit, 0)
    else:
        first = min(first, until)
        until = min(until, first + limit)
    of_page_alone = {"from_turn": start, "from_depth": first, "until": until}
    part = connection.execute(_PART_OF_PATH, of_page_alone).all()
    depths = {row.id: row.depth for row in part}
    found = reads.jobs_by_turn(connection, list(depths), oldest_first=goes_on)
    if sum(map(reads.n_text_chars, found.values())) >= reads.MAX_PAGE_CHARS:
        # Very long texts ended the page early: leave out the turns beyond the last job that was read.
        of_jobs = [depths[turn_id] for turn_id in found]
        first, until = (first, max(of_jobs) + 1) if goes_on else (min(of_jobs), until)
    shown = {turn_id for turn_id, depth in depths.items() if first <= depth < until}
    system: dict[int, str] = {}
    sent: dict[int, list[Message]] = {}
    for row in connection.execute(_BESIDE_PROMPTS, {"of_turns": sorted(shown), "max_text": MAX_BEFORE_CHARS}):
        if row.role == "system" and row.position == 0:
            system[row.turn_id] = row.content
        else:
            sent.setdefault(row.turn_id, []).append(Message(role=row.role, content=row.content))
    imported: dict[int, list[Message]] = {}
    without_jobs = {"of_turns": [turn_id for turn_id in shown if turn_id not in found]}
    for turn_id, role, content, thinking, thinking_s in connection.execute(_MESSAGES_OF, without_jobs):
        message = Message(role=role, content=content, thinking=thinking, thinking_s=thinking_s)
        imported.setdefault(turn_id, []).append(message)
    # The others have expired.
    visible = [row for row in part if row.id in shown and (row.id in found or row.id in system or row.id in imported)]
    beside = tree.siblings(
        connection, conversation.id, [tree.ShownTurn(row.id, row.parent_id, row.conversation_id) for row in visible]
    )
    others = _other_answers(
        connection,
        conversation,
        [
            tree.ShownTurn(row.id, row.parent_id, row.conversation_id)
            for row in visible
            if row.id in found and beside[row.id].n_siblings > 1
        ],
        public_id.strip(),
    )
    threaded = [
        ThreadTurn(
            row.depth,
            system.get(row.id),
            () if row.id in imported else sent.get(row.id, ()),
            found.get(row.id),
            imported.get(row.id, ()),
            row.id,
            row.parent_id,
            row.conversation_id == conversation.id,
            *beside[row.id],
            others.get(row.id, ()),
        )
        for row in visible
    ]
    # Up from the page, not from the head.
    begins = next((row.id for row in part if row.depth >= first), end)
    before_page = {"from_turn": begins, "first": first, "most": MAX_EARLIER}
    n_earlier, depth_before, turn_before = connection.execute(_EARLIER, before_page).one()
    beginning: str | None = connection.execute(first_prompt(conversation.id, max_text)).scalar()
    return Thread(
        conversation.id,
        threaded,
        n_earlier,
        0 if depth_before is None else depth_before + 1,
        turn_before,
        until,
        turns.system_in_force(connection, newest.system_turn_id) or "",
        beginning,
        end,
        end == conversation.head_turn_id,
        branch is None,
    )


def _other_answers(
    connection: Connection, conversation: tree.Conversation, shown: Sequence[tree.ShownTurn], public_id: str
) -> dict[int, list[Answer]]:
    if not shown:
        return {}
    by_turn = tree.other_answers(connection, conversation.id, shown)
    of_others = [turn_id for others in by_turn.values() for turn_id in others]
    # Those are missing that would make the page too long.
    jobs = reads.jobs_by_turn(connection, of_others) if of_others else {}
    return {
        turn_id: [Answer(one, jobs[one], jobs[one].conversation_id == public_id) for one in others if one in jobs]
        for turn_id, others in by_turn.items()
    }


_recent = turns.path(is_bounded=True)
_whole = turns.path()
_PART_OF_PATH = (
    select(_recent.c.id, _recent.c.depth, TurnRow.parent_id, TurnRow.conversation_id)
    .join(TurnRow, TurnRow.id == _recent.c.id)
    .where(_recent.c.depth >= bindparam("from_depth"), _recent.c.depth < bindparam("until"))
    .order_by(_recent.c.depth)
)
_user_message = aliased(MessageRow)
_BESIDE_PROMPTS = (
    select(
        MessageRow.turn_id,
        MessageRow.position,
        MessageRow.role,
        # A context message stands there, whole.
        case(
            (MessageRow.position <= 1, MessageRow.content),
            else_=func.substr(MessageRow.content, 1, bindparam("max_text")),
        ).label("content"),
    )
    .where(
        MessageRow.turn_id.in_(bindparam("of_turns", expanding=True)),
        not_(MessageRow.is_reply),
        or_(
            MessageRow.role != literal_column("'user'"),
            MessageRow.position
            < select(func.max(_user_message.position))
            .where(_user_message.turn_id == MessageRow.turn_id, _user_message.role == literal_column("'user'"))
            .scalar_subquery(),
        ),
    )
    .order_by(MessageRow.turn_id, MessageRow.position)
)
_MESSAGES_OF = (
    select(MessageRow.turn_id, MessageRow.role, MessageRow.content, MessageRow.thinking, MessageRow.thinking_s)
    .where(MessageRow.turn_id.in_(bindparam("of_turns", expanding=True)), not_(turns.is_system))
    .order_by(MessageRow.turn_id, MessageRow.position)
)
_earlier = (
    select(_whole.c.id, _whole.c.depth)
    .where(_whole.c.depth < bindparam("first"), sql_exists().where(MessageRow.turn_id == _whole.c.id))
    .limit(bindparam("most"))
    .subquery("earlier")
)
# The path is walked no further than the limit asks. On a path, a turn that is deeper has the greater id.
_EARLIER = select(func.count(), func.max(_earlier.c.depth), func.max(_earlier.c.id))


def first_prompt(conversation_id: Any, max_text: int) -> Select[str]:
    """The first prompt among the conversation's own turns, which does not count those that a fork continues."""
    return (
        select(func.substr(MessageRow.content, 1, max_text))
        .join(TurnRow, TurnRow.id == MessageRow.turn_id)
        .where(TurnRow.conversation_id == conversation_id, MessageRow.role == "user")
        .order_by(TurnRow.id, MessageRow.position)
        .limit(1)
    )


def exists(connection: Connection, owner_id: int, public_id: str) -> bool:
    return _id(connection, owner_id, public_id) is not None


_BY_PUBLIC_ID = select(ConversationRow.id, ConversationRow.head_turn_id).where(
    reads.has_public_id(bindparam("of_owner"), bindparam("of_public_id"))
)


def _id(connection: Connection, owner_id: int, public_id: str) -> int | None:
    found = connection.execute(_BY_PUBLIC_ID, {"of_owner": owner_id, "of_public_id": public_id.strip()}).first()
    return None if found is None else found.id


def _head(connection: Connection, owner_id: int, public_id: str) -> int | None:
    """The id of the conversation's newest turn. None: no such conversation."""
    found = connection.execute(_BY_PUBLIC_ID, {"of_owner": owner_id, "of_public_id": public_id.strip()}).first()
    return None if found is None else found.head_turn_id


def message_list(connection: Connection, owner_id: int, public_id: str) -> MessageList:
    head = _head(connection, owner_id, public_id)
    return MessageList(
        conversation_id=public_id.strip(),
        exists=head is not None,
        messages=[] if head is None else turns.path_messages(connection, head),
    )


def messages(connection: Connection, owner_id: int, public_id: str) -> list[Message]:
    """The messages on the path to the head, oldest first; empty for an unknown conversation."""
    return message_list(connection, owner_id, public_id).messages


_HEAD_AND_ITS_JOB = (
    select(ConversationRow.head_turn_id, TurnRow.depth, JobRow.id.label("job_id"))
    .join(TurnRow, TurnRow.id == ConversationRow.head_turn_id)
    .outerjoin(JobRow, JobRow.turn_id == ConversationRow.head_turn_id)
    .where(reads.has_public_id(bindparam("of_owner"), bindparam("of_public_id")))
)


def latest(connection: Connection, owner_id: int, public_id: str) -> Latest:
    of = {"of_owner": owner_id, "of_public_id": public_id.strip()}
    conversation = connection.execute(_HEAD_AND_ITS_JOB, of).first()
    if conversation is None:
        return Latest(
            conversation_id=public_id.strip(), exists=False, last_user=None, last_assistant=None, last_job=None
        )
    job_id = conversation.job_id or _newest_job(connection, conversation.head_turn_id, conversation.depth)
    last = turns.newest_messages(connection, conversation.head_turn_id, conversation.depth)
    return Latest(
        conversation_id=public_id.strip(),
        exists=True,
        last_user=last.get("user"),
        last_assistant=last.get("assistant"),
        last_job=None if job_id is None else reads.job_by_id(connection, owner_id, job_id),
    )


def _newest_job(connection: Connection, head_turn_id: int, depth: int) -> int | None:
    """The job of the last turn on the path that has one."""
    # Nearly always it is among the last turns.
    for from_depth in sorted({max(0, depth - 20), 0}, reverse=True):
        of = {"from_turn": head_turn_id, "from_depth": from_depth}
        if (found := connection.execute(_NEWEST_JOB, of).scalar()) is not None:
            return found
    return None


_NEWEST_JOB = (
    select(JobRow.id)
    .join_from(_recent, JobRow, JobRow.turn_id == _recent.c.id)
    .order_by(_recent.c.depth.desc())
    .limit(1)
)


def lane(connection: Connection, owner_id: int, public_id: str, from_job: int | None = None) -> Lane | None:
    """The open jobs of a conversation, or all jobs from `from_job` on, ended or not. None: no such conversation."""
    conversation_id = _id(connection, owner_id, public_id)
    return None if conversation_id is None else _lane(connection, conversation_id, from_job)


def lanes(connection: Connection, owner_id: int, places: Sequence[tuple[int, int | None]]) -> list[Lane | None]:
    """For each conversation with its `from_job` what `lane` says; a conversation may stand there twice. None: the owner
    has no such conversation."""
    wanted = {conversation_id for conversation_id, _ in places}
    mine = set(
        connection.execute(
            select(ConversationRow.id).where(
                ConversationRow.id.in_(wanted), ConversationRow.owner_id == owner_id, reads.is_kept
            )
        ).scalars()
    )
    return [
        _lane(connection, conversation_id, from_job) if conversation_id in mine else None
        for conversation_id, from_job in places
    ]


def _lane(connection: Connection, conversation_id: int, from_job: int | None) -> Lane:
    newest_job = newest_jobs(connection, [conversation_id]).get(conversation_id, 0)
    if from_job is not None:
        return Lane(conversation_id, jobs_after(connection, conversation_id, from_job - 1), newest_job)
    still_open = select(JobRow.id).where(
        JobRow.conversation_id == conversation_id,
        JobRow.status.in_([literal_column("'queued'"), literal_column("'processing'")]),
    )
    return Lane(conversation_id, list(connection.execute(still_open.order_by(JobRow.id)).scalars()), newest_job)


def newest_jobs(connection: Connection, conversation_ids: Iterable[int]) -> dict[int, int]:
    """The id of the newest job of each conversation, by conversation id. Those without a job are left out."""
    rows = connection.execute(
        select(JobRow.conversation_id, func.max(JobRow.id))
        .where(JobRow.conversation_id.in_(list(conversation_ids)))
        .group_by(JobRow.conversation_id)
    )
    return {row[0]: row[1] for row in rows}


def jobs_after(connection: Connection, conversation_id: int, job_id: int) -> list[int]:
    """The ids of the conversation's jobs after `job_id`, ascending."""
    query = select(JobRow.id).where(JobRow.conversation_id == conversation_id, JobRow.id > job_id).order_by(JobRow.id)
    return list(connection.execute(query).scalars())
