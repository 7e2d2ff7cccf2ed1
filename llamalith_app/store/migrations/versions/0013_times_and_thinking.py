"""An attempt knows when its model was ready, its prompt read and its first token there; a reply keeps its thinking."""

from __future__ import annotations

import sqlalchemy as sa
from advanced_alchemy.types import DateTimeUTC
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for column in ("loaded_at", "prompt_read_at", "first_token_at"):
        op.add_column("attempts", sa.Column(column, DateTimeUTC(), nullable=True))
    op.add_column("messages", sa.Column("thinking", sa.Text(), nullable=True))
    op.add_column("messages", sa.Column("thinking_s", sa.Float(), nullable=True))
    op.add_column("jobs", sa.Column("partial_thinking", sa.Text(), nullable=True))
