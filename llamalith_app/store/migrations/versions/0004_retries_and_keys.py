"""Jobs that try others again, kinds of failed attempts, and the answers of requests with an Idempotency-Key."""

from __future__ import annotations

import sqlalchemy as sa
from advanced_alchemy.types import BigIntIdentity, DateTimeUTC
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempts", sa.Column("kind", sa.String(length=40), nullable=True))
    op.add_column("jobs", sa.Column("retry_of", BigIntIdentity, nullable=True))
    is_one = "retry_of IS NOT NULL"
    op.create_index(
        "one_retry_a_job",
        "jobs",
        ["retry_of"],
        unique=True,
        sqlite_where=sa.text(is_one),
        postgresql_where=sa.text(is_one),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("owner_id", BigIntIdentity, nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("created_at", DateTimeUTC(), nullable=False),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name=op.f("fk_idempotency_keys_owner_id_users")),
        sa.PrimaryKeyConstraint("owner_id", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_index("idempotency_keys_by_age", "idempotency_keys", ["created_at"])
