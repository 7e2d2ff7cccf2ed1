"""`llamalith init`: a `.env` with fresh secrets."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

import bcrypt
import click
import msgspec

from llamalith_app.errors import ConfigError

BCRYPT_COST = 12


class Generated(msgspec.Struct, frozen=True):
    """Shown once; only the password's hash is kept."""

    password: str
    token: str


def write_env(path: Path, *, replace: bool = False) -> Generated:
    """Writes fresh secrets to a file that only its owner reads. Raises ConfigError where it exists already."""
    generated = Generated(password=secrets.token_urlsafe(12), token=f"llm_{secrets.token_urlsafe(32)}")
    hashed = bcrypt.hashpw(generated.password.encode(), bcrypt.gensalt(BCRYPT_COST)).decode()
    lines = (
        "# Llamalith's secrets, made by `llamalith init`; keep this file to yourself.\n"
        f"SECRET_KEY={secrets.token_urlsafe(48)}\n"
        f"ADMIN_PASSWORD_HASH='{hashed}'\n"
        f"N8N_API_TOKEN={generated.token}\n"
    )
    try:
        # Written whole beside it and then named, so that no half of it is ever there.
        descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=".env-")
        with os.fdopen(descriptor, "w") as file:
            file.write(lines)
        if replace:
            os.replace(draft, path)
        else:
            try:
                os.link(draft, path)
            finally:
                os.unlink(draft)
    except FileExistsError:
        raise ConfigError([f"{path}: exists already; --force replaces it and its secrets"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be written: {error.strerror}"]) from None
    return generated


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), help="Write it there and not to the current folder.")
@click.option("--force", is_flag=True, help="Replace a .env that is there.")
def command(data_dir: Path | None, force: bool) -> None:
    """Write a .env with fresh secrets, and show the password and the token this once."""
    folder = data_dir or Path.cwd()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    generated = write_env(folder / ".env", replace=force)
    click.echo(f"wrote {folder / '.env'}; what follows is shown this once")
    click.echo(f"admin password  {generated.password}")
    click.echo(f"API token       {generated.token}")
