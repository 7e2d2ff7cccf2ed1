"""New messages come into the index of words some at a time, no longer in the transaction that stores them.

See `store/search.py`. So a message that is deleted or changed may not be in the index yet.
"""

from __future__ import annotations

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

# The literals of `store/search.py` as they were when this was written.
OLD, NEW = (f"({row}.turn_id << 20) | {row}.position, substr({row}.content, 1, 100000)" for row in ("old", "new"))
IS_INDEXED = "EXISTS (SELECT 1 FROM texts_docsize WHERE id = (old.turn_id << 20) | old.position)"
REMOVE = f"INSERT INTO texts (texts, rowid, text) VALUES ('delete', {OLD});"  # noqa: S608 - fixed texts
ADD = f"INSERT INTO texts (rowid, text) VALUES ({NEW});"  # noqa: S608


def upgrade() -> None:
    if op.get_bind().dialect.name != "sqlite":
        return
    for name in ("message_added", "message_deleted", "message_changed"):
        op.execute(f"DROP TRIGGER {name}")
    for name, event, body in (
        ("message_deleted", "DELETE ON messages", REMOVE),
        ("message_changed", "UPDATE OF content ON messages", f"{REMOVE} {ADD}"),
    ):
        op.execute(f"CREATE TRIGGER {name} AFTER {event} WHEN {IS_INDEXED} BEGIN {body} END")
