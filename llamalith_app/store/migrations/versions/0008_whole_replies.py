"""What of a job's schema only the whole reply is validated against, and what that validation found."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("unenforced", sa.Text(), nullable=True))
    op.add_column("jobs", sa.Column("reply_valid", sa.Boolean(), nullable=True))
    op.add_column("jobs", sa.Column("reply_problem", sa.Text(), nullable=True))
