"""The first schema: users, workers, conversations, jobs, attempts, messages."""

from __future__ import annotations

import sqlalchemy as sa
from advanced_alchemy.types import BigIntIdentity, DateTimeUTC
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column("id", BigIntIdentity, nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("role", sa.String(length=20), nullable=False),
        sa.Column("created_at", DateTimeUTC(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
        sa.UniqueConstraint("name", name=op.f("uq_users_name")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "workers",
        sa.Column("id", BigIntIdentity, nullable=False),
        sa.Column("host", sa.String(length=255), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("lock_path", sa.Text(), nullable=False),
        sa.Column("models", sa.Text(), nullable=False),
        sa.Column("n_slots", sa.Integer(), nullable=False),
        sa.Column("beat", sa.Integer(), nullable=False),
        sa.Column("started_at", DateTimeUTC(), nullable=False),
        sa.Column("seen_at", DateTimeUTC(), nullable=False),
        sa.Column("ended_at", DateTimeUTC(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "workers_alive",
        "workers",
        ["seen_at"],
        unique=False,
        sqlite_where=sa.text("ended_at IS NULL"),
        postgresql_where=sa.text("ended_at IS NULL"),
    )

    op.create_table(
        "conversations",
        sa.Column("id", BigIntIdentity, nullable=False),
        sa.Column("owner_id", BigIntIdentity, nullable=False),
        sa.Column("public_id", sa.String(length=200), nullable=False),
        sa.Column("title", sa.Text(), nullable=True),
        sa.Column("next_turn", sa.Integer(), nullable=False),
        sa.Column("created_at", DateTimeUTC(), nullable=False),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name=op.f("fk_conversations_owner_id_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_conversations")),
        sa.UniqueConstraint("id", "owner_id", name="conversation_with_owner"),
        sa.UniqueConstraint("owner_id", "public_id", name="public_id_of_owner"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "jobs",
        sa.Column("id", BigIntIdentity, nullable=False),
        sa.Column("conversation_id", BigIntIdentity, nullable=False),
        sa.Column("owner_id", BigIntIdentity, nullable=False),
        sa.Column("turn", sa.Integer(), nullable=False),
        sa.Column("model", sa.String(length=100), nullable=False),
        sa.Column("system_prompt", sa.Text(), nullable=False),
        sa.Column("grammar_name", sa.String(length=100), nullable=True),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("request_id", sa.String(length=128), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("not_before", DateTimeUTC(), nullable=False),
        sa.Column("lease_token", sa.String(length=64), nullable=True),
        sa.Column("beat", sa.Integer(), nullable=False),
        sa.Column("worker_id", BigIntIdentity, nullable=True),
        sa.Column("error_kind", sa.String(length=40), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("finish_reason", sa.String(length=20), nullable=True),
        sa.Column("prompt_tokens", sa.Integer(), nullable=True),
        sa.Column("completion_tokens", sa.Integer(), nullable=True),
        sa.Column("omitted_messages", sa.Integer(), nullable=False),
        sa.Column("created_at", DateTimeUTC(), nullable=False),
        sa.Column("started_at", DateTimeUTC(), nullable=True),
        sa.Column("processed_at", DateTimeUTC(), nullable=True),
        sa.CheckConstraint("(status = 'error') = (error IS NOT NULL)", name=op.f("ck_jobs_error_has_reason")),
        sa.CheckConstraint(
            "(status = 'processing') = (lease_token IS NOT NULL)", name=op.f("ck_jobs_lease_while_processing")
        ),
        sa.CheckConstraint(
            "(status IN ('done','error','cancelled')) = (processed_at IS NOT NULL)",
            name=op.f("ck_jobs_ended_when_terminal"),
        ),
        sa.CheckConstraint(
            "status IN ('queued','processing','done','error','cancelled')", name=op.f("ck_jobs_status_known")
        ),
        sa.CheckConstraint("attempt >= 0 AND beat >= 0 AND max_attempts >= 1", name=op.f("ck_jobs_counts")),
        sa.ForeignKeyConstraint(
            ["conversation_id", "owner_id"],
            ["conversations.id", "conversations.owner_id"],
            name=op.f("fk_jobs_conversation_id_conversations"),
        ),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name=op.f("fk_jobs_worker_id_workers")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.UniqueConstraint("conversation_id", "id", name="job_with_conversation"),
        sa.UniqueConstraint("conversation_id", "turn", name="one_job_a_turn"),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "held_by_worker",
        "jobs",
        ["worker_id"],
        unique=False,
        sqlite_where=sa.text("status = 'processing'"),
        postgresql_where=sa.text("status = 'processing'"),
    )
    op.create_index("jobs_of_owner", "jobs", ["owner_id", "id"], unique=False)
    op.create_index("jobs_of_owner_by_status", "jobs", ["owner_id", "status", "id"], unique=False)
    op.create_index(
        "one_processing",
        "jobs",
        ["conversation_id"],
        unique=True,
        sqlite_where=sa.text("status = 'processing'"),
        postgresql_where=sa.text("status = 'processing'"),
    )
    op.create_index(
        "open_by_conversation",
        "jobs",
        ["conversation_id", "turn"],
        unique=False,
        sqlite_where=sa.text("status IN ('queued','processing')"),
        postgresql_where=sa.text("status IN ('queued','processing')"),
    )

    op.create_table(
        "attempts",
        sa.Column("job_id", BigIntIdentity, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("worker_id", BigIntIdentity, nullable=False),
        sa.Column("lease_token", sa.String(length=64), nullable=False),
        sa.Column("started_at", DateTimeUTC(), nullable=False),
        sa.Column("ended_at", DateTimeUTC(), nullable=True),
        sa.Column("outcome", sa.String(length=20), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "outcome IN ('done','failed','lost','cancelled','released')",
            name=op.f("ck_attempts_outcome_known"),
        ),
        sa.CheckConstraint("(outcome IS NULL) = (ended_at IS NULL)", name=op.f("ck_attempts_outcome_when_ended")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_attempts_job_id_jobs")),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name=op.f("fk_attempts_worker_id_workers")),
        sa.PrimaryKeyConstraint("job_id", "attempt", name=op.f("pk_attempts")),
        sa.UniqueConstraint("lease_token", name=op.f("uq_attempts_lease_token")),
    )
    op.create_table(
        "messages",
        sa.Column("id", BigIntIdentity, nullable=False),
        sa.Column("conversation_id", BigIntIdentity, nullable=False),
        sa.Column("place", sa.Integer(), nullable=False),
        sa.Column("role", sa.String(length=20), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("job_id", BigIntIdentity, nullable=True),
        sa.Column("created_at", DateTimeUTC(), nullable=False),
        sa.CheckConstraint(
            "role = CASE place % 4 WHEN 0 THEN 'system' WHEN 2 THEN 'user' ELSE 'assistant' END",
            name=op.f("ck_messages_role_at_place"),
        ),
        sa.CheckConstraint("job_id IS NULL OR place % 4 >= 2", name=op.f("ck_messages_job_at_prompt_and_reply")),
        sa.ForeignKeyConstraint(
            ["conversation_id", "job_id"],
            ["jobs.conversation_id", "jobs.id"],
            name=op.f("fk_messages_conversation_id_jobs"),
        ),
        sa.ForeignKeyConstraint(
            ["conversation_id"], ["conversations.id"], name=op.f("fk_messages_conversation_id_conversations")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_messages")),
        sa.UniqueConstraint("conversation_id", "place", name="one_message_a_place"),
        sa.UniqueConstraint("job_id", "role", name="one_prompt_and_one_reply"),
        sqlite_autoincrement=True,
    )
    op.create_index("newest_by_role", "messages", ["conversation_id", "role", "place"])
    op.create_index(
        "due",
        "jobs",
        ["model", "priority", "id"],
        sqlite_where=sa.text("status = 'queued'"),
        postgresql_where=sa.text("status = 'queued'"),
    )
    if op.get_bind().dialect.name == "sqlite":
        op.execute(
            """
            CREATE TRIGGER terminal_is_final BEFORE UPDATE OF status ON jobs
            WHEN old.status IN ('done', 'error', 'cancelled')
            BEGIN SELECT RAISE(ABORT, 'a terminal status never changes'); END
            """
        )
    else:
        op.execute(
            """
            CREATE FUNCTION refuse_to_change_what_is_terminal() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                RAISE 'a terminal status never changes' USING ERRCODE = 'integrity_constraint_violation';
            END $$
            """
        )
        op.execute(
            """
            CREATE TRIGGER terminal_is_final BEFORE UPDATE OF status ON jobs
            FOR EACH ROW WHEN (old.status IN ('done', 'error', 'cancelled'))
            EXECUTE FUNCTION refuse_to_change_what_is_terminal()
            """
        )
    op.execute("INSERT INTO users (name, role, created_at) VALUES ('admin', 'admin', CURRENT_TIMESTAMP)")
