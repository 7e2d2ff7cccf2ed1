"""Conversations are named, pinned, archived, tagged, deleted, and found by their texts.

The public id of a deleted conversation is free again, so a partial index replaces the constraint that kept it unique.
On SQLite an index of words over titles and messages (FTS5, see `store/search.py`) is filled and then kept in step by
triggers.
"""

from __future__ import annotations

import sqlalchemy as sa
import structlog
from advanced_alchemy.types import BigIntIdentity, DateTimeUTC
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

TURNS_A_STEP = 20_000
NEW_COLUMNS = ("title_by", "source", "pinned_at", "archived_at", "deleted_at")
# The literals of `store/search.py` as they were when this was written.
SEARCHED = "{row}.role IN ('user','assistant')"
MESSAGE = "({row}.turn_id << 20) | {row}.position, substr({row}.content, 1, 100000)"
TITLE = "-{row}.id, {row}.title"

log = structlog.get_logger(__name__)


def upgrade() -> None:
    on_sqlite = op.get_bind().dialect.name == "sqlite"
    if on_sqlite:
        _rebuild_on_sqlite()
    else:
        _alter_elsewhere()
    _create_indexes()
    op.create_table(
        "conversation_tags",
        sa.Column("conversation_id", BigIntIdentity, nullable=False),
        sa.Column("tag", sa.String(length=50), nullable=False),
        sa.ForeignKeyConstraint(
            ["conversation_id"], ["conversations.id"], name=op.f("fk_conversation_tags_conversation_id_conversations")
        ),
        sa.PrimaryKeyConstraint("conversation_id", "tag", name=op.f("pk_conversation_tags")),
    )
    op.create_index("conversations_by_tag", "conversation_tags", ["tag"])
    if on_sqlite:
        _index_words()


def _alter_elsewhere() -> None:
    op.drop_constraint("public_id_of_owner", "conversations")
    op.add_column("conversations", sa.Column("title_by", sa.String(length=10), nullable=True))
    op.add_column("conversations", sa.Column("source", sa.String(length=20), nullable=True))
    for column in ("pinned_at", "archived_at", "deleted_at"):
        op.add_column("conversations", sa.Column(column, DateTimeUTC(), nullable=True))
    op.create_check_constraint(
        op.f("ck_conversations_title_by_known"), "conversations", "title_by IN ('auto','person')"
    )
    op.create_check_constraint(
        op.f("ck_conversations_title_of_person"), "conversations", "title_by <> 'person' OR title IS NOT NULL"
    )


def _rebuild_on_sqlite() -> None:
    """SQLite drops no constraint of a table: the rows are copied into a new one."""
    connection = op.get_bind()
    newest_id = connection.execute(sa.text("SELECT seq FROM sqlite_sequence WHERE name = 'conversations'")).scalar()
    op.execute(
        """
        CREATE TABLE new_conversations (
            id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
            owner_id INTEGER NOT NULL,
            public_id VARCHAR(200) NOT NULL,
            title TEXT,
            title_by VARCHAR(10),
            source VARCHAR(20),
            head_turn_id INTEGER CONSTRAINT head_of_conversation REFERENCES turns (id),
            created_at DATETIME NOT NULL,
            pinned_at DATETIME,
            archived_at DATETIME,
            deleted_at DATETIME,
            CONSTRAINT fk_conversations_owner_id_users FOREIGN KEY(owner_id) REFERENCES users (id),
            CONSTRAINT conversation_with_owner UNIQUE (id, owner_id),
            CONSTRAINT ck_conversations_title_by_known CHECK (title_by IN ('auto','person')),
            CONSTRAINT ck_conversations_title_of_person CHECK (title_by <> 'person' OR title IS NOT NULL)
        )
        """
    )
    op.execute(
        "INSERT INTO new_conversations (id, owner_id, public_id, title, head_turn_id, created_at)"
        " SELECT id, owner_id, public_id, title, head_turn_id, created_at FROM conversations ORDER BY id"
    )
    op.drop_table("conversations")
    op.rename_table("new_conversations", "conversations")
    # Ids that were given once are not given again, though their conversations have expired.
    connection.execute(sa.text("DELETE FROM sqlite_sequence WHERE name = 'conversations'"))
    if newest_id is not None:
        connection.execute(
            sa.text("INSERT INTO sqlite_sequence (name, seq) VALUES ('conversations', :seq)"), {"seq": newest_id}
        )
    op.create_index(op.f("ix_conversations_head_turn_id"), "conversations", ["head_turn_id"])


def _create_indexes() -> None:
    for name, columns, where, unique in (
        ("public_id_of_owner", ["owner_id", "public_id"], "deleted_at IS NULL", True),
        ("deleted_conversations", ["deleted_at"], "deleted_at IS NOT NULL", False),
        ("pinned_conversations", ["owner_id", "pinned_at"], "pinned_at IS NOT NULL", False),
        ("archived_conversations", ["owner_id", "archived_at"], "archived_at IS NOT NULL", False),
        ("conversations_without_title", ["source", "created_at"], "title_by IS NULL", False),
    ):
        op.create_index(
            name,
            "conversations",
            columns,
            unique=unique,
            sqlite_where=sa.text(where),
            postgresql_where=sa.text(where),
        )


def _index_words() -> None:
    """A message stands in the index under its turn and position, a title under its conversation's negative id."""
    op.execute("CREATE VIRTUAL TABLE texts USING fts5(text, content='', tokenize=\"unicode61 remove_diacritics 2\")")
    connection = op.get_bind()
    highest = connection.execute(sa.text("SELECT coalesce(max(id), 0) FROM turns")).scalar_one()
    for first in range(1, highest + 1, TURNS_A_STEP):
        last = first + TURNS_A_STEP - 1
        connection.execute(
            sa.text(
                f"INSERT INTO texts (rowid, text) SELECT {MESSAGE.format(row='m')} FROM messages m"  # noqa: S608
                f" WHERE m.turn_id BETWEEN :first AND :last AND {SEARCHED.format(row='m')}"
                " ORDER BY m.turn_id, m.position"
            ),
            {"first": first, "last": last},
        )
        log.info("texts are indexed", done=min(last, highest), of=highest)
    op.execute(
        f"INSERT INTO texts (rowid, text) SELECT {TITLE.format(row='c')} FROM conversations c"  # noqa: S608
        " WHERE c.title IS NOT NULL"
    )
    add = "INSERT INTO texts (rowid, text) VALUES ({what});"
    # A table of words alone forgets a text only if it is told which one it was.
    remove = "INSERT INTO texts (texts, rowid, text) VALUES ('delete', {what});"
    for name, event, condition, body in (
        ("message_added", "INSERT ON messages", SEARCHED.format(row="new"), add.format(what=MESSAGE.format(row="new"))),
        (
            "message_deleted",
            "DELETE ON messages",
            SEARCHED.format(row="old"),
            remove.format(what=MESSAGE.format(row="old")),
        ),
        (
            "message_changed",
            "UPDATE OF content ON messages",
            SEARCHED.format(row="old"),
            remove.format(what=MESSAGE.format(row="old")) + " " + add.format(what=MESSAGE.format(row="new")),
        ),
        ("title_added", "INSERT ON conversations", "new.title IS NOT NULL", add.format(what=TITLE.format(row="new"))),
        (
            "title_set",
            "UPDATE OF title ON conversations",
            "old.title IS NULL AND new.title IS NOT NULL",
            add.format(what=TITLE.format(row="new")),
        ),
        (
            "title_replaced",
            "UPDATE OF title ON conversations",
            "old.title IS NOT NULL",
            remove.format(what=TITLE.format(row="old"))
            + f" INSERT INTO texts (rowid, text) SELECT {TITLE.format(row='new')} WHERE new.title IS NOT NULL;",
        ),
        (
            "title_deleted",
            "DELETE ON conversations",
            "old.title IS NOT NULL",
            remove.format(what=TITLE.format(row="old")),
        ),
    ):
        op.execute(f"CREATE TRIGGER {name} AFTER {event} WHEN {condition} BEGIN {body} END")
