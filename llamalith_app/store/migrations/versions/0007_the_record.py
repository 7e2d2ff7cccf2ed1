"""What tells one record from every other: two may use one Redis, where their jobs have the same ids."""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    record = op.create_table("record", sa.Column("id", sa.String(16), primary_key=True))
    op.bulk_insert(record, [{"id": secrets.token_hex(8)}])
