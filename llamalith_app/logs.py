"""Structured logs on standard error, and `say` for standard output. Used by every process.

Owns the format: JSON lines, or readable text, coloured on a terminal. Routes the log lines of libraries. A line that
cannot be written is dropped and stops nothing. Logs hold ids, counts and reasons, never a prompt, a reply, a token or a
cookie.
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
    """Standard error that never raises: a line is lost if the disk is full or the reader has gone."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return sys.stderr.write(text)
        return 0

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def say(line: str) -> None:
    """Prints a line on standard output, for the person who started this process. It is lost if it cannot be written."""
    try:
        click.echo(line)
    except OSError:
        # Python would try to flush the buffer again at exit, and fail with an exit code of its own.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open as long as the process


QUIET = ("httpx", "httpcore", "alembic", "asyncio", "aiosqlite", "sqlalchemy", "uvicorn.access")


FIRST_REFUSAL = 400
"""HTTP statuses from here on are shown on a terminal too."""

FIRST = ("process", "method", "route", "status", "ms")
"""Fields that stand first in a line, in this order."""


def _in_order(_logger: Any, _name: str, event: dict[str, Any]) -> dict[str, Any]:
    return {**{name: event[name] for name in FIRST if name in event}, **event}


def _on_one_line(_logger: Any, _name: str, event: dict[str, Any]) -> dict[str, Any]:
    """Escapes control characters, so that a quoted text cannot fake a second line or control the terminal.

    Tracebacks stay as they are.
    """
    return {
        name: _plain(value) if isinstance(value, str) and name not in ("exception", "stack") else value
        for name, value in event.items()
    }


def _plain(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _without_routine_requests(_logger: Any, _name: str, event: dict[str, Any]) -> dict[str, Any]:
    """Hides each request that succeeded: on a terminal they would push away what a person looks for."""
    if event["event"] == "request" and event["level"] == "info" and event.get("status", FIRST_REFUSAL) < FIRST_REFUSAL:
        raise structlog.DropEvent
    return event


def start(process: str, config: Config) -> None:
    """Sets up logging for a process, named `process` in each line. Called once, by its composition root."""
    log_format, level = config.log_format, config.log_level
    text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        *([_without_routine_requests] if on_terminal and level != "debug" else []),
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
    # Our own lines are written directly; only those of libraries pass through `logging`.
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
    # SAQ warns at every orderly stop; jobs/queue.py logs what matters.
    logging.getLogger("saq").setLevel(logging.ERROR)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def log_settings(config: Config, warnings: Iterable[str]) -> None:
    """Logs one line about where the settings come from, and a line for each warning, also about model files."""
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
