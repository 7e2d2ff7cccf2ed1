"""Structured logs of every process: JSON lines, or a readable form, coloured on a terminal. And what a command says on
standard output; neither stops anything where it cannot be written.

Owns their format and where other libraries' lines go. What is logged is ids, counts and reasons: never a prompt,
a reply, a token or a cookie.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO, cast

import click
import msgspec
import structlog

from llamalith_app.settings.config import Config
from llamalith_app.settings.environment import allows_colours
from llamalith_app.settings.models import model_warnings


class _StandardError:
    """A line that cannot be written, on a full disk or to a reader that has gone, is lost: what it tells of goes on."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return sys.stderr.write(text)
        return 0

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def say(line: str) -> None:
    """On standard output, for whoever started this process; lost where it cannot be written."""
    try:
        click.echo(line)
    except OSError:
        # What stays in its buffer would be tried again at the end, and its failure be the exit code.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open as long as the process


QUIET = ("httpx", "httpcore", "alembic", "asyncio", "aiosqlite", "sqlalchemy", "uvicorn.access")


FIRST = ("process", "method", "route", "status", "ms")
"""Fields in front of a line's others, in this order."""


def _in_order(_logger: Any, _name: str, event: dict[str, Any]) -> dict[str, Any]:
    return {**{name: event[name] for name in FIRST if name in event}, **event}


def _on_one_line(_logger: Any, _name: str, event: dict[str, Any]) -> dict[str, Any]:
    """Nothing that a line quotes can look like another line, or speak to the terminal. Tracebacks stay as they are."""
    return {
        name: _plain(value) if isinstance(value, str) and name not in ("exception", "stack") else value
        for name, value in event.items()
    }


def _plain(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def start(process: str, config: Config) -> None:
    """Called once by a process's composition root."""
    log_format, level = config.log_format, config.log_level
    text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        lambda _logger, _name, event: {"process": process, **event},
        _in_order,
        *([_on_one_line] if text else []),
    ]
    renderer: Any = (
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty() and allows_colours(),
            sort_keys=False,
            exception_formatter=structlog.dev.plain_traceback,
        )
        if text
        else structlog.processors.JSONRenderer(
            serializer=lambda event, **_: msgspec.json.encode(event, enc_hook=repr).decode()
        )
    )
    exceptions: list[Any] = [] if text else [structlog.processors.format_exc_info]
    # Our own lines go straight out; only those of libraries come by way of `logging`.
    structlog.configure(
        processors=[*shared, *exceptions, renderer],
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _StandardError())),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            *exceptions,
            renderer,
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    # It warns at every orderly stop; what matters of it is told by jobs/queue.py.
    logging.getLogger("saq").setLevel(logging.ERROR)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def tell_settings(config: Config, warnings: Iterable[str]) -> None:
    """Logs in one line which files the settings come from, and each warning, those of the models' files too."""
    log = structlog.get_logger(__name__)
    log.info(
        "settings read",
        data_dir=str(config.data_dir),
        env_file=str(config.env_file) if config.env_file else None,
        config=str(config.config_path) if config.config_path else None,
        environment=list(config.from_environment),
    )
    for warning in (*config.warnings, *warnings, *model_warnings(config)):
        log.warning(warning)
