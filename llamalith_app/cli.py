"""The `llamalith` command: which subcommands there are, and how a failure is told.

A subcommand's module is imported when it is called: `up` must stay small, and only `web` needs the web.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import NamedTuple

import click
from typing_extensions import override

from llamalith_app import __version__
from llamalith_app.errors import ConfigError, LlamalithError
from llamalith_app.supervise import signals


class Subcommand(NamedTuple):
    module: str
    help: str


SUBCOMMANDS = {
    "up": Subcommand("llamalith_app.commands.up", "Run the whole product on this machine."),
    "web": Subcommand("llamalith_app.commands.web", "Run the web process alone."),
    "worker": Subcommand("llamalith_app.commands.worker", "Run a worker alone."),
    "migrate": Subcommand("llamalith_app.commands.migrate", "Bring the database to this version's schema."),
    "init": Subcommand("llamalith_app.commands.init", "Write a .env with fresh secrets."),
    "check": Subcommand("llamalith_app.commands.check", "Judge the record by its invariants."),
    "backup": Subcommand("llamalith_app.commands.backup", "Copy the record to a file, while it is in use."),
    "restore": Subcommand("llamalith_app.commands.restore", "Make the record from such a file."),
    "healthcheck": Subcommand("llamalith_app.commands.healthcheck", "Tell whether web or worker is alive here."),
    "config": Subcommand("llamalith_app.commands.config", "Judge a config.json, or print its schema."),
    "hash-password": Subcommand("llamalith_app.commands.hash_password", "Print a password's hash for .env."),
}


class Lazy(click.Group):
    @override
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    @override
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUBCOMMANDS:
            return None
        command: click.Command = importlib.import_module(SUBCOMMANDS[cmd_name].module).command
        return command

    @override
    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, subcommand.help) for name, subcommand in SUBCOMMANDS.items()])


@click.group(cls=Lazy)
@click.version_option(__version__, prog_name="llamalith")
def llamalith() -> None:
    """A durable, self-hosted queue for local language models."""


def main() -> None:
    """Problems of the configuration go to stderr, one a line, and exit code is 2; other known failures: 1."""
    # From the first moment on, also as PID 1, which ends by no signal that it does not handle.
    handled = [number for number in signals.requests_to_end() if number != signal.SIGINT]
    for number in handled:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        _run()
    except SystemExit as ended:
        for number in handled:
            if ended.code == 128 + number and os.getpid() != 1:
                # What was begun is cleaned up; supervisors take a death by their own signal for an orderly one.
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        raise


def _run() -> None:
    try:
        llamalith(prog_name="llamalith")
    except ConfigError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        sys.exit(2)
    except LlamalithError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno is None:
            raise
        print(f"{error.filename or 'llamalith'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
