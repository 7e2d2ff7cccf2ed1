"""The `llamalith` command: lists the subcommands, and turns errors into messages and exit codes.

A subcommand's module is imported when it is called, so that `up` stays small and only `web` loads the web framework.
"""

from __future__ import annotations

import gc
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
    "migrate": Subcommand("llamalith_app.commands.migrate", "Upgrade the database to this version's schema."),
    "init": Subcommand("llamalith_app.commands.init", "Write a .env with new secrets."),
    "check": Subcommand("llamalith_app.commands.check", "Check the invariants of the database."),
    "backup": Subcommand("llamalith_app.commands.backup", "Copy the database to a file, even while it is in use."),
    "restore": Subcommand("llamalith_app.commands.restore", "Make the database from a backup file."),
    "healthcheck": Subcommand(
        "llamalith_app.commands.healthcheck", "Say whether web or worker is alive on this machine."
    ),
    "config": Subcommand("llamalith_app.commands.config", "Validate a config.json, or print its schema."),
    "hash-password": Subcommand("llamalith_app.commands.hash_password", "Print a password's hash for .env."),
}


class LazyGroup(click.Group):
    """A group that imports a subcommand's module only when it is called."""

    @override
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    @override
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUBCOMMANDS:
            return None
        # What a module makes stays. To look through it for garbage again and again takes a quarter of a start.
        gc.disable()
        command: click.Command = importlib.import_module(SUBCOMMANDS[cmd_name].module).command
        gc.freeze()
        gc.enable()
        return command

    @override
    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, subcommand.help) for name, subcommand in SUBCOMMANDS.items()])


@click.group(cls=LazyGroup)
@click.version_option(__version__, prog_name="llamalith")
def llamalith() -> None:
    """A durable, self-hosted queue for local language models."""


def main() -> None:
    """Runs the command. Exits with 2 after configuration problems, printed one a line, and with 1 after others."""
    # Installed first: without a handler PID 1 ignores these signals.
    handled = [number for number in signals.requests_to_end() if number != signal.SIGINT]
    for number in handled:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        _run()
    except SystemExit as ended:
        for number in handled:
            if ended.code == 128 + number and os.getpid() != 1:
                # Clean-up is done. A supervisor regards a death by its own signal as an orderly stop.
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        raise
    finally:
        # The interpreter would look through all that is left, which takes half a second of web's end.
        gc.freeze()


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
