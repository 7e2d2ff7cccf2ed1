"""Indexes for ended jobs that are not kept for ever: which are old, and which messages are theirs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    has_ended = "processed_at IS NOT NULL"
    op.create_index(
        "ended_by_age",
        "jobs",
        ["processed_at"],
        sqlite_where=sa.text(has_ended),
        postgresql_where=sa.text(has_ended),
    )
    op.create_index("messages_of_job", "messages", ["conversation_id", "job_id"])
