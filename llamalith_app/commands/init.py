"""`llamalith init`: writes a `.env` with new secrets, atomically, and replaces an existing one only with --force."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import click
import msgspec

from llamalith_app.commands.hash_password import hashed
from llamalith_app.commands.settings import settings_options
from llamalith_app.errors import ConfigError


class Generated(msgspec.Struct, frozen=True):
    """The secrets to show once: the file holds only the password's hash."""

    password: str
    token: str


@click.command("init")
@settings_options
@click.option("--force", is_flag=True, help="Replace an existing .env with all its contents.")
def command(data_dir: Path | None, env_file: Path | None, force: bool) -> None:
    """Write a .env with a new admin password, API token and secret key.

    It is written to ENV_FILE, else into DATA_DIR, else into the current folder. A .env in DATA_DIR is read when the
    current folder has none."""
    here = Path.cwd() / ".env"
    path = env_file or (data_dir / ".env" if data_dir else here)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    generated = write_env(path, force=force)
    click.echo(f"wrote {path}; what follows is shown this once")
    click.echo(f"admin password  {generated.password}")
    click.echo(f"API token       {generated.token}")
    if path != here and here.exists():
        click.echo(f"note: from this folder {here} is read instead, unless --env-file {path} is given", err=True)


def write_env(path: Path, *, force: bool = False) -> Generated:
    """Writes new secrets to `path`, mode 0600, and returns those to show.

    Raises ConfigError if the file exists and `force` is not set, or if it cannot be written.
    """
    generated = Generated(password=secrets.token_urlsafe(18), token=f"llm_{secrets.token_urlsafe(32)}")
    content = (
        "# Secrets of this Llamalith; .env.example explains what else may stand here.\n"
        f"SECRET_KEY={secrets.token_urlsafe(48)}\n"
        f"N8N_API_TOKEN={generated.token}\n"
        "# Single quotes: a shell that reads this file must leave the $ alone.\n"
        f"ADMIN_PASSWORD_HASH='{hashed(generated.password.encode())}'\n"
    )
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        try:
            _write_private(draft, content.encode())
            if force:
                draft.replace(path)
            else:
                # Unlike a rename, a hard link never replaces an existing file.
                path.hardlink_to(draft)
        finally:
            draft.unlink(missing_ok=True)
    except FileExistsError:
        raise ConfigError([f"{path}: is there already; --force replaces it"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be written: {error.strerror}"]) from None
    return generated


def _write_private(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(fd)
