"""`llamalith hash-password`: a bcrypt hash for ADMIN_PASSWORD_HASH."""

from __future__ import annotations

import sys

import bcrypt
import click

from llamalith_app.commands.init import BCRYPT_COST
from llamalith_app.errors import ConfigError

MAX_PASSWORD_BYTES = 72
"""bcrypt takes no more."""


@click.command("hash-password")
def command() -> None:
    """Read a password without echo (from a pipe: its first line) and print its hash."""
    if sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    n_bytes = len(password.encode(errors="replace"))
    if n_bytes == 0:
        raise ConfigError(["the password is empty"])
    if n_bytes > MAX_PASSWORD_BYTES:
        raise ConfigError([f"the password has {n_bytes} bytes; bcrypt takes at most {MAX_PASSWORD_BYTES}"])
    if "\0" in password:
        raise ConfigError(["the password holds a NUL"])
    click.echo(bcrypt.hashpw(password.encode(), bcrypt.gensalt(BCRYPT_COST)).decode())
