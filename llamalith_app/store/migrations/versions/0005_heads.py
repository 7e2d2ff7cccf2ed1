"""Which job of a conversation may be the next, and an index of those."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # SQLite adds no column without a default; whoever inserts a job says it.
    op.add_column("jobs", sa.Column("is_head", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.execute(
        """
        UPDATE jobs SET is_head = true WHERE status IN ('queued', 'processing') AND NOT EXISTS (
            SELECT 1 FROM jobs AS earlier WHERE earlier.conversation_id = jobs.conversation_id
            AND earlier.status IN ('queued', 'processing') AND earlier.turn < jobs.turn)
        """
    )
    op.create_index(
        "heads",
        "jobs",
        ["model", "priority", "id"],
        sqlite_where=sa.text("status = 'queued' AND is_head = 1"),
        postgresql_where=sa.text("status = 'queued' AND is_head"),
    )
