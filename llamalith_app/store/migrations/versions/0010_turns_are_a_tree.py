"""Turns become rows with a parent, and messages stand in a turn at a position.

Before, turn t of a conversation owned the places 4t (system), 4t + 1 (context), 4t + 2 (prompt) and 4t + 3 (reply).
Each turn of which something is left becomes a row whose parent is the one before it. A conversation whose newest turns
have expired keeps an empty one as its head, so that its numbers go on where they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import sqlalchemy as sa
import structlog
from advanced_alchemy.types import BigIntIdentity, DateTimeUTC
from alembic import op

from llamalith_app.contracts.conversations import Message
from llamalith_app.store import digests

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

CONVERSATIONS_A_STEP = 5000

log = structlog.get_logger(__name__)


def upgrade() -> None:
    on_sqlite = op.get_bind().dialect.name == "sqlite"
    _make_turns()
    op.rename_table("messages", "old_messages")
    if not on_sqlite:
        op.drop_constraint("pk_messages", "old_messages")
    _make_messages()
    op.execute(
        f"ALTER TABLE conversations ADD COLUMN head_turn_id {'INTEGER' if on_sqlite else 'BIGINT'}"
        " CONSTRAINT head_of_conversation REFERENCES turns (id)"
    )
    op.add_column("jobs", sa.Column("turn_id", BigIntIdentity, nullable=True))
    op.create_index("old_turns", "turns", ["conversation_id", "depth"])
    for first, last, n_conversations in _steps():
        between = {"first": first, "last": last}
        _fill(between)
        _write_digests(between)
        log.info("turns become a tree", done=min(last, n_conversations), of=n_conversations)
    op.drop_index("old_turns", "turns")
    op.drop_table("old_messages")
    op.drop_column("conversations", "next_turn")
    op.create_index(op.f("ix_conversations_head_turn_id"), "conversations", ["head_turn_id"])
    if on_sqlite:
        _rebuild_on_sqlite()
    else:
        _alter_elsewhere()


def _make_turns() -> None:
    op.create_table(
        "turns",
        sa.Column("id", BigIntIdentity, nullable=False),
        sa.Column("conversation_id", BigIntIdentity, nullable=False),
        sa.Column("parent_id", BigIntIdentity, nullable=True),
        sa.Column("depth", sa.Integer(), nullable=False),
        sa.Column("system_turn_id", BigIntIdentity, nullable=True),
        sa.Column("digest", sa.String(length=64), nullable=True),
        sa.Column("created_at", DateTimeUTC(), nullable=False),
        sa.ForeignKeyConstraint(
            ["conversation_id"], ["conversations.id"], name=op.f("fk_turns_conversation_id_conversations")
        ),
        sa.ForeignKeyConstraint(["parent_id"], ["turns.id"], name=op.f("fk_turns_parent_id_turns")),
        sa.ForeignKeyConstraint(["system_turn_id"], ["turns.id"], name=op.f("fk_turns_system_turn_id_turns")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_turns")),
        sa.UniqueConstraint("conversation_id", "id", name="turn_with_conversation"),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_turns_parent_id"), "turns", ["parent_id"])
    op.create_index(op.f("ix_turns_system_turn_id"), "turns", ["system_turn_id"])
    op.create_index(
        "turns_by_digest",
        "turns",
        ["digest"],
        sqlite_where=sa.text("digest IS NOT NULL"),
        postgresql_where=sa.text("digest IS NOT NULL"),
    )


def _make_messages() -> None:
    op.create_table(
        "messages",
        sa.Column("turn_id", BigIntIdentity, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("role", sa.String(length=20), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("tool_calls", sa.Text(), nullable=True),
        sa.Column("tool_call_id", sa.Text(), nullable=True),
        sa.Column("is_reply", sa.Boolean(), nullable=False),
        sa.Column("created_at", DateTimeUTC(), nullable=False),
        sa.CheckConstraint("role IN ('system','user','assistant','tool')", name=op.f("ck_messages_role_known")),
        sa.CheckConstraint("role = 'assistant' OR NOT is_reply", name=op.f("ck_messages_reply_by_the_assistant")),
        sa.CheckConstraint("position >= 0", name=op.f("ck_messages_position_counts")),
        sa.ForeignKeyConstraint(["turn_id"], ["turns.id"], name=op.f("fk_messages_turn_id_turns")),
        sa.PrimaryKeyConstraint("turn_id", "position", name=op.f("pk_messages")),
    )
    op.create_index(
        "one_reply_a_turn",
        "messages",
        ["turn_id"],
        unique=True,
        sqlite_where=sa.text("is_reply = 1"),
        postgresql_where=sa.text("is_reply"),
    )


def _steps() -> Iterator[tuple[int, int, int]]:
    """Ids of conversations from, to, and the highest."""
    highest = op.get_bind().execute(sa.text("SELECT coalesce(max(id), 0) FROM conversations")).scalar_one()
    for first in range(1, highest + 1, CONVERSATIONS_A_STEP):
        yield first, first + CONVERSATIONS_A_STEP - 1, highest


def _fill(between: dict[str, int]) -> None:
    """Turns, messages and who points at them, of the conversations with ids from `first` to `last`."""
    for statement in (
        """
        INSERT INTO turns (conversation_id, depth, created_at)
        SELECT c.id, parts.number, coalesce(min(parts.created_at), min(c.created_at)) FROM (
            SELECT conversation_id, place / 4 AS number, created_at FROM old_messages
            UNION ALL SELECT conversation_id, turn, created_at FROM jobs
            UNION ALL SELECT id, next_turn - 1, NULL FROM conversations
        ) AS parts JOIN conversations c ON c.id = parts.conversation_id
        WHERE c.id BETWEEN :first AND :last
        GROUP BY c.id, parts.number ORDER BY c.id, parts.number
        """,
        """
        INSERT INTO messages (turn_id, position, role, content, is_reply, created_at)
        SELECT t.id, row_number() OVER (PARTITION BY t.id ORDER BY m.place) - 1, m.role, m.content,
            m.place % 4 = 3, m.created_at
        FROM turns t JOIN old_messages m ON m.conversation_id = t.conversation_id AND m.place / 4 = t.depth
        WHERE t.conversation_id BETWEEN :first AND :last ORDER BY t.id, m.place
        """,
        """
        UPDATE turns SET parent_id = found.parent_id, system_turn_id = found.system_turn_id FROM (
            SELECT t.id, lag(t.id) OVER path AS parent_id,
                max(CASE WHEN m.role = 'system' THEN t.id END) OVER path AS system_turn_id
            FROM turns t LEFT JOIN messages m ON m.turn_id = t.id AND m.position = 0
            WHERE t.conversation_id BETWEEN :first AND :last
            WINDOW path AS (PARTITION BY t.conversation_id ORDER BY t.id)
        ) AS found WHERE found.id = turns.id
        """,
        """
        UPDATE conversations SET head_turn_id = (SELECT max(id) FROM turns WHERE conversation_id = conversations.id)
        WHERE id BETWEEN :first AND :last
        """,
        """
        UPDATE jobs SET turn_id = (
            SELECT id FROM turns WHERE conversation_id = jobs.conversation_id AND depth = jobs.turn
        ) WHERE conversation_id BETWEEN :first AND :last
        """,
    ):
        op.get_bind().execute(sa.text(statement), between)


def _write_digests(between: dict[str, int]) -> None:
    """Of each turn that has its reply: of all that was answered up to it, but for system messages in force."""
    connection = op.get_bind()
    # CROSS JOIN: in the order of the two indexes, so that no text is sorted.
    rows = connection.execution_options(stream_results=True).execute(
        sa.text(
            """
            SELECT t.conversation_id, t.id, m.role, m.content, m.is_reply
            FROM turns t CROSS JOIN messages m WHERE m.turn_id = t.id
            AND t.conversation_id BETWEEN :first AND :last AND NOT (m.position = 0 AND m.role = 'system')
            ORDER BY t.conversation_id, t.id, m.position
            """
        ),
        between,
    )
    found = []
    for _, of_conversation in groupby(rows, lambda row: row.conversation_id):
        digest: str | None = None
        for turn_id, of_turn in groupby(of_conversation, lambda row: row.id):
            turn = list(of_turn)
            if turn[-1].is_reply:
                digest = digests.extend(digest, [Message(role=row.role, content=row.content) for row in turn])
                found.append({"id": turn_id, "digest": digest})
    if found:
        connection.execute(sa.text("UPDATE turns SET digest = :digest WHERE id = :id"), found)


def _alter_elsewhere() -> None:
    op.drop_index("open_by_conversation", "jobs")
    op.drop_constraint("one_job_a_turn", "jobs")
    op.drop_column("jobs", "turn")
    op.alter_column("jobs", "turn_id", nullable=False)
    op.create_unique_constraint("one_job_a_turn", "jobs", ["turn_id"])
    op.create_foreign_key(
        op.f("fk_jobs_conversation_id_turns"),
        "jobs",
        "turns",
        ["conversation_id", "turn_id"],
        ["conversation_id", "id"],
    )
    op.create_index(
        "open_by_conversation",
        "jobs",
        ["conversation_id", "id"],
        postgresql_where=sa.text("status IN ('queued','processing')"),
    )


def _rebuild_on_sqlite() -> None:
    """SQLite changes no constraint of a table: its own text of the table is changed, and the rows are copied."""
    connection = op.get_bind()
    (definition,) = connection.execute(sa.text("SELECT sql FROM sqlite_schema WHERE name = 'jobs'")).scalars()
    beside = connection.execute(
        sa.text("SELECT sql FROM sqlite_schema WHERE tbl_name = 'jobs' AND type <> 'table' AND sql IS NOT NULL")
    ).scalars()
    again = [_changed(sql, {"(conversation_id, turn)": "(conversation_id, id)"}, missing=True) for sql in beside]
    newest_id = connection.execute(sa.text("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'")).scalar()
    columns = [
        column
        for column in connection.execute(sa.text("SELECT name FROM pragma_table_info('jobs')")).scalars()
        if column != "turn"
    ]
    op.execute(
        _changed(
            definition,
            {
                "CREATE TABLE jobs": "CREATE TABLE new_jobs",
                ", turn_id INTEGER": "",
                "\tturn INTEGER NOT NULL": "\tturn_id INTEGER NOT NULL",
                "CONSTRAINT one_job_a_turn UNIQUE (conversation_id, turn)": "CONSTRAINT one_job_a_turn UNIQUE (turn_id)"
                ", \n\tCONSTRAINT fk_jobs_conversation_id_turns FOREIGN KEY(conversation_id, turn_id)"
                " REFERENCES turns (conversation_id, id)",
            },
        )
    )
    listed = ", ".join(columns)
    op.execute(f"INSERT INTO new_jobs ({listed}) SELECT {listed} FROM jobs ORDER BY id")  # noqa: S608 - our own names
    op.drop_table("jobs")
    op.rename_table("new_jobs", "jobs")
    for sql in again:
        op.execute(sql)
    # Ids that were given once are not given again, though their jobs have expired.
    connection.execute(sa.text("DELETE FROM sqlite_sequence WHERE name = 'jobs'"))
    if newest_id is not None:
        connection.execute(
            sa.text("INSERT INTO sqlite_sequence (name, seq) VALUES ('jobs', :newest_id)"), {"newest_id": newest_id}
        )


def _changed(text: str, changes: dict[str, str], *, missing: bool = False) -> str:
    for old, new in changes.items():
        if old not in text and not missing:
            raise RuntimeError(f"The table is not as the migrations before left it: {old!r} is missing.")
        text = text.replace(old, new)
    return text
