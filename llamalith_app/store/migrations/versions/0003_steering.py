"""What a job says of its sampling and of its time, what is left of one that was stopped, what workers tell."""

from __future__ import annotations

import sqlalchemy as sa
from advanced_alchemy.types import DateTimeUTC
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("parameters", sa.Text(), nullable=True))
    op.add_column("jobs", sa.Column("timeout_s", sa.Float(), nullable=True))
    op.add_column("jobs", sa.Column("not_after", DateTimeUTC(), nullable=True))
    op.add_column("jobs", sa.Column("prompt_tokens_reused", sa.Integer(), nullable=True))
    op.add_column("jobs", sa.Column("partial", sa.Text(), nullable=True))
    op.add_column("workers", sa.Column("engines", sa.Text(), nullable=True))
    waits = "status = 'queued' AND not_after IS NOT NULL"
    op.create_index(
        "given_up_in_the_queue",
        "jobs",
        ["not_after"],
        sqlite_where=sa.text(waits),
        postgresql_where=sa.text(waits),
    )
