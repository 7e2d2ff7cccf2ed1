"""`llamalith up`: runs the whole product on this machine, and makes its secrets at the first start."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import click

from llamalith_app import logs
from llamalith_app.commands.init import write_env
from llamalith_app.commands.settings import clear_text_warnings, settings_options
from llamalith_app.errors import ConfigError
from llamalith_app.settings.config import Config
from llamalith_app.settings.environment import exported_secrets
from llamalith_app.settings.load import load
from llamalith_app.settings.secret_checks import require_secrets
from llamalith_app.supervise import up


@click.command("up")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
@settings_options
@click.option("--grace", default=30.0, show_default=True, type=click.FloatRange(0), help="Seconds for a drain.")
def command(host: str, port: int, data_dir: Path | None, env_file: Path | None, grace: float) -> None:
    """Run web, worker, engines and queue until Ctrl-C. A process that dies is restarted."""
    config, secrets = _settings(data_dir, env_file)
    if secrets:
        # At once too: only a hash of the password is stored, and a start that is killed is never ready.
        logs.say("\n".join(secrets))

    def on_ready(url: str) -> None:
        # In one write, so that no log line comes between the secrets and the URL.
        logs.say("\n".join([*secrets, f"llamalith: ready {url}"]))

    sys.exit(_run(config, host, port, grace, on_ready))


def _run(config: Config, host: str, port: int, grace_s: float, on_ready: Callable[[str], None]) -> int:
    try:
        weak = require_secrets(config)
    except ConfigError as error:
        raise ConfigError([*error.problems, *_why_none_was_made(config)]) from None
    logs.start("up", config)
    logs.log_settings(config, [*weak, *clear_text_warnings(config, host)])
    return asyncio.run(up.run(config, host=host, port=port, grace_s=grace_s, on_ready=on_ready))


def _settings(data_dir: Path | None, env_file: Path | None) -> tuple[Config, list[str]]:
    """All settings, with new secrets where there is no `.env` and the environment has none either; and the lines that
    show new secrets to a person, none where nothing was generated.

    They are written to `env_file`, default: the data directory's `.env`. `--env-file ./.env` is otherwise the same as
    none: that file is read where it is, else the data directory's.
    """
    named = env_file if env_file != Path.cwd() / ".env" else None
    if named is None or named.exists():
        config = load(data_dir=data_dir, env_file=named)
    else:
        config = load(data_dir=data_dir)
        if config.env_file is not None or exported_secrets():
            found = config.env_file or "the environment"
            raise ConfigError(
                [f"--env-file: {named}: there is no such file, and none is written since there are secrets in {found}"]
            )
    if config.env_file is not None or config.secret_key or config.admin_password_hash or config.api_token:
        # Somebody wrote this .env, perhaps for another program: nothing is added to it.
        return config, []
    path = env_file or config.data_dir / ".env"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    generated = write_env(path)
    return load(data_dir=config.data_dir, env_file=path), [
        f"llamalith: wrote {path}; what follows is shown at this start only",
        f"llamalith: admin password  {generated.password}",
        f"llamalith: API token       {generated.token}",
    ]


def _why_none_was_made(config: Config) -> list[str]:
    exported = exported_secrets()
    if len(exported) in (0, 3) or config.env_file is not None:
        return []
    return [f"{exported[0]}: is set in the environment, so no .env was written; unset it, or set all three"]
