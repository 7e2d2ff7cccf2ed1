"""Runs the migrations on the engine that `store/migrate.py` hands over, all of them in one transaction."""

from __future__ import annotations

from alembic import context

from llamalith_app.store import tables

with context.config.engine.connect() as connection:  # type: ignore[attr-defined]
    on_sqlite = connection.dialect.name == "sqlite"
    if on_sqlite:
        # A table that others point to cannot be written anew while they are held; they are looked at below. Set on the
        # driver's connection: within a transaction it would mean nothing.
        connection.connection.execute("PRAGMA foreign_keys = OFF")
    context.configure(
        connection=connection,
        target_metadata=tables.JobRow.metadata,
        transactional_ddl=True,
        render_as_batch=True,
        # SQLAlchemy has no words for SQLite's index of texts, which is five tables.
        include_name=lambda name, kind, _: kind != "table" or not str(name).startswith("texts"),
    )
    with context.begin_transaction():
        context.run_migrations()
        if on_sqlite and (broken := connection.exec_driver_sql("PRAGMA foreign_key_check").first()):
            raise RuntimeError(f"A migration left a row that points to nothing: {broken}")
    connection.commit()
    if on_sqlite:
        connection.connection.execute("PRAGMA foreign_keys = ON")
