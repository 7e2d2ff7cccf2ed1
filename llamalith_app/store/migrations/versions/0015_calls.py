"""Jobs of OpenAI clients: whether the client still waits, and how long they are kept. How many tokens a job thought,
and whether it is to answer now."""

from __future__ import annotations

import sqlalchemy as sa
from advanced_alchemy.types import DateTimeUTC
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "calls",
        sa.Column("job_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("digest", sa.String(64), nullable=True),
        sa.Column("n_open", sa.Integer(), nullable=False),
        sa.Column("left_at", DateTimeUTC(), nullable=True),
        sa.Column("is_stored", sa.Boolean(), nullable=False),
        sa.Column("is_background", sa.Boolean(), nullable=False),
        sa.Column("created_at", DateTimeUTC(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"]),
        sa.PrimaryKeyConstraint("job_id"),
    )
    for name, column in (("calls_by_digest", "digest"), ("calls_left", "left_at")):
        where = sa.text(f"{column} IS NOT NULL")
        op.create_index(name, "calls", [column], sqlite_where=where, postgresql_where=where)
    op.add_column("jobs", sa.Column("thinking_tokens", sa.Integer(), nullable=True))
    op.add_column("jobs", sa.Column("answers_now", sa.Boolean(), nullable=True))
    op.create_index("calls_by_age", "calls", ["is_stored", "created_at"])
