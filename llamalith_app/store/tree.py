"""The branches of a conversation: its turns as a tree, the siblings of a turn, which of these compare models, and which
branch people see.

A conversation holds its own turns, and those turns of other conversations that its own continue: it was forked there.
Children of its own turns are its own too, or the beginnings of forks, which it does not hold. Its head is always one of
its own turns without children of its own.

Writes only heads; `store/jobs/submission.py` makes turns, `store/retention.py` deletes them. Runs inside a transaction
or snapshot of `store/database.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from sqlalchemy import (
    BindParameter,
    Connection,
    Select,
    Table,
    and_,
    bindparam,
    exists,
    func,
    literal_column,
    not_,
    or_,
    select,
)
from sqlalchemy.orm import aliased

from llamalith_app.contracts.conversations import TreeTurn, TurnTree
from llamalith_app.errors import NotFound
from llamalith_app.store import turns
from llamalith_app.store.tables import ConversationRow, JobRow, MessageRow, TurnRow

ROOT = 0
"""As the id of a parent: the new turn begins anew, with no parent."""
NO_CONVERSATION = "Conversation not found"
NO_TURN = "This conversation has no such turn"


class Conversation(NamedTuple):
    id: int
    head_turn_id: int


class Siblings(NamedTuple):
    """The place of a turn among the turns with the same parent that its conversation holds."""

    sibling: int = 1
    """1 is the oldest."""
    n_siblings: int = 1
    """Itself included."""
    previous_sibling: int | None = None
    """A turn id, as the next one."""
    next_sibling: int | None = None


class Place(NamedTuple):
    """Where a turn stands on its path."""

    parent_id: int | None
    depth: int
    job_id: int | None


class ShownTurn(NamedTuple):
    """A turn of which a page wants the siblings."""

    id: int
    parent_id: int | None
    conversation_id: int


_turns = cast(Table, TurnRow.__table__)
_shown: BindParameter[int] = bindparam("shown", expanding=True)
_child, _above, _own = aliased(TurnRow), aliased(TurnRow), aliased(TurnRow)
_of_conversation = bindparam("of_conversation", type_=_turns.c.conversation_id.type)
_recent = turns.path(is_bounded=True)
_ON_PATH = select(_recent.c.id).where(_recent.c.id == bindparam("of_turn"))

_start = select(TurnRow.id, TurnRow.conversation_id).where(TurnRow.id == bindparam("of_turn"))
_below = _start.cte("below", recursive=True)
_below = _below.union_all(
    select(_child.id, _child.conversation_id)
    .join(_below, _child.parent_id == _below.c.id)
    # Not into the forks that begin at its own turns.
    .where(or_(_child.conversation_id == _of_conversation, _below.c.conversation_id != _of_conversation))
)
_NEWEST_BELOW = select(func.max(_below.c.id)).where(
    _below.c.conversation_id == _of_conversation, _below.c.id != bindparam("but")
)

_foreign = (
    select(_above.id, _above.parent_id)
    .join(_own, _own.parent_id == _above.id)
    .where(_own.conversation_id == _of_conversation, _above.conversation_id != _of_conversation)
).cte("foreign", recursive=True)
_upper = aliased(TurnRow)
# A union without duplicates: forks share most of their paths.
_foreign = _foreign.union(select(_upper.id, _upper.parent_id).join(_foreign, _upper.id == _foreign.c.parent_id))
_FOREIGN_PAGE = (
    select(_foreign.c.id).where(_foreign.c.id > bindparam("after")).order_by(_foreign.c.id).limit(bindparam("most"))
)
_OWN_PAGE = (
    select(TurnRow.id)
    .where(TurnRow.conversation_id == _of_conversation, TurnRow.id > bindparam("after"))
    .order_by(TurnRow.id)
    .limit(bindparam("most"))
)
_FOREIGN_BESIDE = (
    select(_child.id)
    .join(_above, _above.id == _child.parent_id)
    .where(
        _child.parent_id.in_(bindparam("of_parents", expanding=True)),
        _child.id.not_in(_shown),
        _child.conversation_id != _of_conversation,
        _above.conversation_id != _of_conversation,
    )
    .limit(1)
)


def _places(foreign: Any) -> Select[Any]:
    """The places of the turns `shown` among all that have one of the parents. `foreign`: those turns of other
    conversations that count."""
    in_order: dict[str, Any] = {"partition_by": TurnRow.parent_id, "order_by": TurnRow.id}
    everyone = (
        select(
            TurnRow.id,
            func.row_number().over(**in_order).label("sibling"),
            func.count().over(partition_by=TurnRow.parent_id).label("n_siblings"),
            func.lag(TurnRow.id).over(**in_order).label("previous_sibling"),
            func.lead(TurnRow.id).over(**in_order).label("next_sibling"),
        )
        .where(
            TurnRow.parent_id.in_(bindparam("of_parents", expanding=True)),
            # `+ 0`: SQLite would go through all turns of the conversation.
            or_(TurnRow.conversation_id + 0 == _of_conversation, TurnRow.id.in_(foreign)),
        )
        .subquery("everyone")
    )
    return select(everyone).where(everyone.c.id.in_(_shown))


_PLACES = _places(_shown)
_PLACES_WITH_FOREIGN = _places(select(_foreign.c.id))
_ROOTS = (
    select(TurnRow.id)
    # Not by the index of parents: in it, the roots of all conversations stand together.
    .where(TurnRow.conversation_id == _of_conversation, func.coalesce(TurnRow.parent_id, ROOT) == ROOT)
    .union_all(select(_foreign.c.id).where(_foreign.c.parent_id.is_(None)))
)
_CONVERSATION = select(ConversationRow.id, ConversationRow.head_turn_id).where(
    ConversationRow.owner_id == bindparam("of_owner"),
    ConversationRow.public_id == bindparam("of_public_id"),
    ConversationRow.deleted_at.is_(None),
)
_LOCK_CONVERSATION = _CONVERSATION.with_for_update()


def lock_conversation(connection: Connection, owner_id: int, public_id: str) -> Conversation:
    """The conversation of that owner, locked until the transaction ends. Raises NotFound."""
    return _find(connection, _LOCK_CONVERSATION, owner_id, public_id)


def _find(connection: Connection, query: Any, owner_id: int, public_id: str) -> Conversation:
    found = connection.execute(query, {"of_owner": owner_id, "of_public_id": public_id.strip()}).first()
    if found is None:
        raise NotFound(NO_CONVERSATION)
    return Conversation._make(found)


def possible_parent(connection: Connection, conversation: Conversation, turn_id: int) -> turns.Parent | None:
    """The turn that a new turn of the conversation may go on from: one of its own, one on the path to its head, or
    ROOT. None: it is neither."""
    if turn_id == ROOT:
        return turns.NO_PARENT
    found = turns.find(connection, turn_id)
    if found is None or found.conversation_id == conversation.id or _is_on_path(connection, conversation, found):
        return found
    return None


def branch_through(connection: Connection, conversation: Conversation, turn_id: int) -> int | None:
    """The end of the branch that goes through this turn: the head where that does, else the newest turn below it.
    None: the conversation does not hold the turn (any more)."""
    found = turns.find(connection, turn_id)
    if found is None:
        return None
    if _is_on_path(connection, conversation, found):
        return conversation.head_turn_id
    return newest_below(connection, conversation.id, turn_id)


def _is_on_path(connection: Connection, conversation: Conversation, turn: turns.Parent) -> bool:
    of = {"from_turn": conversation.head_turn_id, "from_depth": turn.depth, "of_turn": turn.id}
    return connection.execute(_ON_PATH, of).first() is not None


def newest_below(connection: Connection, conversation_id: int, turn_id: int, but: int = 0) -> int | None:
    """The newest turn of the conversation that goes through this turn, which may be itself, but for the turn `but`.
    None: there is none."""
    of = {"of_turn": turn_id, "of_conversation": conversation_id, "but": but}
    found: int | None = connection.execute(_NEWEST_BELOW, of).scalar()
    return found


def select_branch(connection: Connection, owner_id: int, public_id: str, turn_id: int) -> int:
    """Makes the newest turn of the conversation below this turn, or itself, the head. Returns that head.

    Raises NotFound: no such conversation of this owner, or it does not hold the turn.
    """
    conversation = lock_conversation(connection, owner_id, public_id)
    head = newest_below(connection, conversation.id, turn_id)
    if head is None:
        raise NotFound(NO_TURN)
    if head != conversation.head_turn_id:
        turns.set_head(connection, conversation.id, head)
    return head


def place(connection: Connection, turn_id: int) -> Place | None:
    """None: there is no such turn. The caller checks whose it is."""
    found = connection.execute(
        select(TurnRow.parent_id, TurnRow.depth, JobRow.id)
        .outerjoin(JobRow, JobRow.turn_id == TurnRow.id)
        .where(TurnRow.id == turn_id)
    ).first()
    return None if found is None else Place._make(found)


def siblings(connection: Connection, conversation_id: int, shown: Sequence[ShownTurn]) -> dict[int, Siblings]:
    """By turn id. `shown`: turns of one path of this conversation."""
    if not shown:
        return {}
    of = {
        "of_conversation": conversation_id,
        "of_parents": [turn.parent_id for turn in shown if turn.parent_id is not None],
        "shown": [turn.id for turn in shown],
    }
    # Which other turns of other conversations it holds takes a look at each of its turns.
    is_fork = connection.execute(_FOREIGN_BESIDE, of).first() is not None
    found = {
        row.id: Siblings(row.sibling, row.n_siblings, row.previous_sibling, row.next_sibling)
        for row in connection.execute(_PLACES_WITH_FOREIGN if is_fork else _PLACES, of)
    }
    for turn in shown:
        if turn.parent_id is None:
            roots = connection.execute(_ROOTS, {"of_conversation": conversation_id}).scalars()
            found[turn.id] = _among(turn.id, sorted(roots))
    return found


def _among(turn_id: int, everyone: Sequence[int]) -> Siblings:
    at = everyone.index(turn_id)
    before, after = everyone[:at], everyone[at + 1 :]
    return Siblings(at + 1, len(everyone), before[-1] if before else None, after[0] if after else None)


MAX_OTHERS = 2
"""Other answers to the prompt of a turn that pages show beside its own: those of the newest turns."""
_beside, _beside_job = aliased(TurnRow), aliased(JobRow)


def _has_inputs_of(turn: Any, other: Any) -> Any:
    """Whether each input message of `other` is also one of `turn`."""
    wanted, found = aliased(MessageRow), aliased(MessageRow)
    same = (
        exists()
        .where(
            found.turn_id == turn.id,
            found.position == wanted.position,
            not_(found.is_reply),
            found.role == wanted.role,
            found.content == wanted.content,
        )
        # The outermost statement is not found by itself.
        .correlate(turn, wanted)
    )
    return not_(exists().where(wanted.turn_id == other.id, not_(wanted.is_reply), not_(same)))


def _others(is_beside: Any) -> Select[int, int]:
    """For each of the turns `shown` and each other model, the newest turn with the same input messages that is beside
    it."""
    return (
        select(TurnRow.id, func.max(_beside.id).label("other"))
        .join(JobRow, JobRow.turn_id == TurnRow.id)
        .join(_beside, is_beside)
        .join(_beside_job, _beside_job.turn_id == _beside.id)
        .where(
            TurnRow.id.in_(_shown),
            _beside_job.model != JobRow.model,
            _has_inputs_of(TurnRow, _beside),
            _has_inputs_of(_beside, TurnRow),
        )
        .group_by(TurnRow.id, _beside_job.model)
    )


def _others_below(foreign: Any) -> Select[int, int]:
    is_held = or_(_beside.conversation_id + 0 == _of_conversation, _beside.id.in_(foreign))
    return _others(and_(_beside.parent_id == TurnRow.parent_id, is_held))


_OTHERS = _others_below(_shown)
_OTHERS_WITH_FOREIGN = _others_below(select(_foreign.c.id))
_OTHER_ROOTS = _others(_beside.id.in_(_ROOTS))


def other_answers(connection: Connection, conversation_id: int, shown: Sequence[ShownTurn]) -> dict[int, list[int]]:
    """By turn id, the turns beside it where other models were sent the same: at most MAX_OTHERS, ascending. `shown`:
    turns of one path of this conversation; those without any are left out."""
    found: dict[int, list[int]] = {}
    for has_parent in (True, False):
        of_parents = [turn.parent_id for turn in shown if turn.parent_id is not None]
        those = [turn.id for turn in shown if (turn.parent_id is not None) == has_parent]
        of = {"of_conversation": conversation_id, "of_parents": of_parents, "shown": those}
        if not those:
            continue
        query = _OTHER_ROOTS
        if has_parent:
            is_fork = connection.execute(_FOREIGN_BESIDE, of).first() is not None
            query = _OTHERS_WITH_FOREIGN if is_fork else _OTHERS
        for row in connection.execute(query, of):
            found.setdefault(row.id, []).append(row.other)
    return {turn_id: sorted(others)[-MAX_OTHERS:] for turn_id, others in found.items()}


_reply, _system = aliased(MessageRow), aliased(MessageRow)
_max_text = bindparam("max_text", type_=JobRow.attempt.type)
_prompt = (
    select(func.substr(MessageRow.content, 1, _max_text))
    .where(MessageRow.turn_id == TurnRow.id, MessageRow.role == literal_column("'user'"), not_(MessageRow.is_reply))
    .order_by(MessageRow.position.desc())
    .limit(1)
    .correlate(TurnRow)
    .scalar_subquery()
)
_TURNS = (
    select(
        TurnRow.id,
        TurnRow.parent_id.label("parent"),
        TurnRow.depth,
        ConversationRow.public_id.label("conversation_id"),
        TurnRow.created_at,
        JobRow.id.label("job_id"),
        JobRow.model,
        JobRow.status,
        func.substr(_system.content, 1, _max_text).label("system_prompt"),
        _prompt.label("prompt"),
        func.substr(_reply.content, 1, _max_text).label("reply"),
    )
    .join(ConversationRow, ConversationRow.id == TurnRow.conversation_id)
    .outerjoin(JobRow, JobRow.turn_id == TurnRow.id)
    .outerjoin(_reply, and_(_reply.turn_id == TurnRow.id, _reply.is_reply))
    .outerjoin(
        _system,
        and_(_system.turn_id == TurnRow.id, _system.position == 0, _system.role == literal_column("'system'")),
    )
    .where(TurnRow.id.in_(bindparam("those", expanding=True)))
    .order_by(TurnRow.id)
)


def tree(connection: Connection, owner_id: int, public_id: str, *, limit: int, after: int, max_text: int) -> TurnTree:
    """At most `limit` turns that the conversation holds, oldest first, from those behind the id `after` on. `max_text`:
    characters of each text. Raises NotFound."""
    found = _find(connection, _CONVERSATION, owner_id, public_id)
    of = {"of_conversation": found.id, "after": after, "most": limit + 1}
    those = sorted(
        turn_id for query in (_OWN_PAGE, _FOREIGN_PAGE) for turn_id in connection.execute(query, of).scalars()
    )
    rows = connection.execute(_TURNS, {"those": those[:limit], "max_text": max_text}).mappings()
    return TurnTree(
        conversation_id=public_id.strip(),
        head=found.head_turn_id,
        turns=[TreeTurn(**row) for row in rows],
        more=len(those) > limit,
    )
