"""`llamalith hash-password`: makes the value of ADMIN_PASSWORD_HASH. The password is never shown."""

from __future__ import annotations

import re
import sys

import bcrypt
import click

from llamalith_app.errors import ConfigError
from llamalith_app.settings import strength

BCRYPT_COST = 12
USUAL_PASSWORD_CHARACTERS = 10
MAX_PASSWORD_BYTES = 72
"""bcrypt's limit."""


@click.command("hash-password")
def command() -> None:
    """Print the bcrypt hash of a password.

    A terminal asks for the password twice; otherwise one line of standard input is read."""
    if sys.stdin.isatty():
        prompt: str = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
        # Bytes that are not UTF-8 arrive as surrogates; they are validated below like any others.
        password = prompt.encode(errors="surrogateescape")
    else:
        password = sys.stdin.buffer.readline().rstrip(b"\r\n")
    password_hash = hashed(password)
    if (n_characters := len(password.decode())) < USUAL_PASSWORD_CHARACTERS:
        click.echo(
            f"warning: the password has {n_characters} characters; {USUAL_PASSWORD_CHARACTERS} or more are usual",
            err=True,
        )
    click.echo(password_hash)


def hashed(password: bytes) -> str:
    """The password's bcrypt hash.

    Raises ConfigError for a password that is empty, longer than 72 bytes, not UTF-8, holds a control character, or can
    be guessed within a day.
    """
    if not password:
        raise ConfigError(["the password is empty"])
    if len(password) > MAX_PASSWORD_BYTES:
        raise ConfigError([f"the password has {len(password)} bytes; bcrypt takes at most {MAX_PASSWORD_BYTES}"])
    try:
        text = password.decode()
    except UnicodeDecodeError:
        raise ConfigError(["the password is not UTF-8 text"]) from None
    if re.search(rb"[\x00-\x1f\x7f]", password):
        raise ConfigError(["the password holds a control character"])
    if strength.n_guesses(text) < strength.GUESSES_A_DAY:
        raise ConfigError(["the password can be guessed within a day; take a longer one, or several rare words"])
    return bcrypt.hashpw(password, bcrypt.gensalt(BCRYPT_COST)).decode()
