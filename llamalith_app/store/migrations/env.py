"""Runs the migrations on the engine that `store/migrate.py` hands over, all of them in one transaction."""

from __future__ import annotations

from alembic import context

from llamalith_app.store import tables

with context.config.engine.connect() as connection:  # type: ignore[attr-defined]
    context.configure(
        connection=connection,
        target_metadata=tables.JobRow.metadata,
        transactional_ddl=True,
        render_as_batch=True,
    )
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
