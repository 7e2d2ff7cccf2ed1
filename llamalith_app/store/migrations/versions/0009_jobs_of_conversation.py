"""An index for the foreign key of jobs: a conversation is deleted without a look at all jobs of its owner."""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("jobs_of_conversation", "jobs", ["conversation_id", "owner_id"])
