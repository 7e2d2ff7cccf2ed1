"""`llamalith up`: the whole product on this machine."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click

from llamalith_app import logs, up
from llamalith_app.commands.init import write_env
from llamalith_app.config import Config, exported_secrets, load, require_secrets
from llamalith_app.errors import ConfigError


@click.command("up")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--data-dir", type=click.Path(path_type=Path, file_okay=False), help="Where all state lives.")
@click.option(
    "--env-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where secrets are written if there are none: ./.env or DATA_DIR/.env (the default).",
)
@click.option("--grace", default=30.0, show_default=True, type=click.FloatRange(0), help="Seconds for a drain.")
def command(host: str, port: int, data_dir: Path | None, env_file: Path | None, grace: float) -> None:
    """Run web, worker, engines and queue until Ctrl-C, and start again what dies."""
    config = load(data_dir=data_dir)
    if not (config.secret_key or config.admin_password_hash or config.api_token):
        config = _with_new_secrets(config, env_file)
    try:
        require_secrets(config)
    except ConfigError as error:
        raise ConfigError([*error.problems, *_why_none_was_made(config)]) from None
    logs.start("up", config)
    sys.exit(asyncio.run(up.run(config, host=host, port=port, grace_s=grace)))


def _why_none_was_made(config: Config) -> list[str]:
    exported = exported_secrets()
    if len(exported) in (0, 3) or (Path.cwd() / ".env").exists() or (config.data_dir / ".env").exists():
        return []
    return [f"{exported[0]}: is set in the environment, so no .env was written; unset it, or set all three"]


def _with_new_secrets(config: Config, env_file: Path | None) -> Config:
    here, there = Path.cwd() / ".env", config.data_dir / ".env"
    path = there if env_file is None else env_file.absolute()
    if path not in (here, there):
        raise ConfigError([f"--env-file {env_file}: only {here} and {there} are read"])
    if here.exists() or there.exists():
        # Somebody wrote it, for this or for something else: it is not ours to fill.
        return config
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    generated = write_env(path)
    logs.say(f"llamalith: wrote {path}; what follows is shown this once")
    logs.say(f"llamalith: admin password  {generated.password}")
    logs.say(f"llamalith: API token       {generated.token}")
    return load(data_dir=config.data_dir)
