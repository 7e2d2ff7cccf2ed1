"""How web and worker begin: settings, logs, secrets, Redis, schema, parent; in this order, and the same for both."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

from llamalith_app import logs
from llamalith_app.commands.settings import clear_text_warnings
from llamalith_app.jobs.queue import refuse_old_redis
from llamalith_app.settings.config import Config
from llamalith_app.settings.load import load
from llamalith_app.settings.secret_checks import require_secrets
from llamalith_app.store.migrate import migrate
from llamalith_app.supervise import parent


def begin(
    name: str, data_dir: Path | None, parent_fd: int | None, *, env_file: Path | None = None, host: str | None = None
) -> Config:
    """Raises ConfigError where this process must not start. It drains when the parent behind `parent_fd` is gone.

    `host`: the address that it will listen on, if any. Without a parent it tells which settings it read, and warns.
    """
    parent.keep_descriptors()
    _give_way()
    config = load(data_dir=data_dir, env_file=env_file)
    logs.start(name, config)
    weak = require_secrets(config)
    if parent_fd is None:
        logs.tell_settings(config, [*weak, *(clear_text_warnings(config, host) if host else [])])
    asyncio.run(refuse_old_redis(config.redis_url))
    migrate(config.database_path)
    if parent_fd is not None:
        parent.watch(parent_fd, lambda: os.kill(os.getpid(), signal.SIGTERM))
    return config


def _give_way() -> None:
    """To the engines, whose threads wait for each other: to interrupt one stops them all. Waits for a free core
    instead, or for the end of a turn, which is some milliseconds; says nothing where there is no such thing."""
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
