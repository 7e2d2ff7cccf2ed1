"""The options of every command that loads the settings."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llamalith_app.errors import ConfigError
from llamalith_app.settings.config import Config
from llamalith_app.settings.messages import shown
from llamalith_app.settings.paths import resolved


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--data-dir` and `--env-file`, as the arguments `data_dir` and `env_file`: absolute paths or None."""
    for option in (
        click.option(
            "--env-file",
            type=click.Path(),
            callback=_absolute,
            help="The .env to read; unset: that of the current folder, else of the data directory.",
        ),
        click.option("--data-dir", type=click.Path(), callback=_absolute, help="Where all state lives."),
    ):
        command = option(command)
    return command


def _absolute(_: click.Context, option: click.Parameter, text: str | None) -> Path | None:
    if text is None:
        return None
    try:
        # A shell leaves the `~` of `--data-dir=~/x` alone.
        return resolved(text, Path.cwd())
    except ValueError as error:
        raise ConfigError([f"{option.opts[0]}: {shown(text)} {error}"]) from None


def clear_text_warnings(config: Config, host: str) -> list[str]:
    """A warning if the web listens for other machines and no trusted proxy, which would bring TLS, stands in front."""
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if is_loopback or config.trusted_proxies:
        return []
    return [
        f"--host {host}: other machines reach it by plain HTTP, so passwords and tokens travel in the clear;"
        " put a proxy with TLS in front and name it in LLAMALITH_TRUSTED_PROXIES"
    ]
