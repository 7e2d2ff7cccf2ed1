"""The counter of a live worker or attempt is called what it is everywhere: its heartbeat."""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("jobs", "workers"):
        # Not Alembic's own way, which copies the whole table on SQLite.
        op.execute(f"ALTER TABLE {table} RENAME COLUMN beat TO heartbeat")
