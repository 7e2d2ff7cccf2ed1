"""The start that web and worker have in common: settings, logs, secrets, Redis, schema and parent, in this order."""

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
    """Prepares this process and returns its configuration. Raises ConfigError if the process must not start.

    With `parent_fd` the process drains when its parent is gone. Without it nobody else has logged the settings and
    their warnings, so that is done here. `host`: the address to listen on, if any.
    """
    parent.keep_descriptors()
    _give_way()
    config = load(data_dir=data_dir, env_file=env_file)
    logs.start(name, config)
    weak = require_secrets(config)
    if parent_fd is None:
        logs.log_settings(config, [*weak, *(clear_text_warnings(config, host) if host else [])])
    asyncio.run(refuse_old_redis(config.redis_url))
    migrate(config.database_path)
    if parent_fd is not None:
        parent.watch(parent_fd, lambda: os.kill(os.getpid(), signal.SIGTERM))
    return config


def _give_way() -> None:
    """Lowers this process's scheduling class to SCHED_BATCH, so that it does not preempt the engines.

    An engine's threads wait for each other, so interrupting one stops them all. This process then waits some
    milliseconds for a core. Does nothing on systems without SCHED_BATCH.
    """
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
