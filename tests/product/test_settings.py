"""Where the settings of a whole product come from, and what the terminal shows of that."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from dotenv import dotenv_values

from llamalith_app.commands.settings import clear_text_warnings
from llamalith_app.settings.config import Config
from tests.product.conftest import LLAMALITH, clean_environ, free_port
from tests.web.conftest import HASH

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SECRETS = (
    f"SECRET_KEY=a secret key of the tests, of 32 bytes\nN8N_API_TOKEN=kV7-qz_0aT3p\nADMIN_PASSWORD_HASH='{HASH}'\n"
)


@contextmanager
def up(folder: Path, *arguments: str, **environ: str) -> Iterator[tuple[int, list[str]]]:
    """The port, and the lines on standard output, once it is ready; what it says on standard error goes to `log`."""
    port = free_port()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [LLAMALITH, "up", "--port", str(port), *arguments],
            cwd=folder,
            env=clean_environ(**environ),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdout is not None
    try:
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            if "ready" in line:
                break
        else:
            raise AssertionError((folder / "log").read_text())
        yield port, lines
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def status_with(port: int, token: str | None) -> int:
    return httpx.get(
        f"http://127.0.0.1:{port}/api/jobs", headers={"Authorization": f"Bearer {token}"}, trust_env=False
    ).status_code


def logged(folder: Path, **wanted: Any) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    return [line for line in lines if wanted.items() <= line.items()]


def test_a_named_env_file_is_read_by_all_parts_and_every_warning_is_shown_once(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / ".env").write_text("N8N_API_TOKEN=the-token-of-another-program\n")
    (tmp_path / "etc" / "a.env").write_text(SECRETS + "LLAMALITH_CONFIG=config.json\n")
    (tmp_path / "etc" / "config.json").write_text(
        '{"available_models": ["smollm2", "m"], "model_paths": {"m": "m.gguf"}, "story_settings": {}}'
    )
    arguments = ("--data-dir", "d", "--env-file", "etc/a.env", "--host", "0.0.0.0")
    with up(tmp_path, *arguments, LLAMALITH_LOG_LEVEL="info") as (port, lines):
        assert [status_with(port, token) for token in ("kV7-qz_0aT3p", "the-token-of-another-program")] == [200, 401]
    assert len(lines) == 2, lines  # migrated, ready
    etc = tmp_path / "etc"
    (logged_line,) = logged(tmp_path, event="settings read")
    assert {key: logged_line[key] for key in ("process", "data_dir", "env_file", "config", "environment")} == {
        "process": "up",
        "data_dir": str(tmp_path / "d"),
        "env_file": str(etc / "a.env"),
        "config": str(etc / "config.json"),
        "environment": ["LLAMALITH_LOG_LEVEL"],
    }
    warnings = [line["event"] for line in logged(tmp_path, level="warning")]
    assert [warning.split(": ")[:2] for warning in warnings] == [
        [f"{etc}/config.json", "means nothing here and is ignored"],
        ["N8N_API_TOKEN", "has 12 characters; 20 or more are usual"],
        ["ADMIN_PASSWORD_HASH", "has the bcrypt cost 6; 10 or more is usual"],
        [
            "--host 0.0.0.0",
            clear_text_warnings(Config(data_dir=tmp_path), "0.0.0.0")[0].partition(": ")[2],
        ],
        [f"{etc}/config.json", "model_paths.m"],
    ]


def test_secrets_are_written_to_the_named_env_file_once_and_never_beside_others(tmp_path: Path) -> None:
    arguments = ("--data-dir", "d", "--env-file", "etc/a.env")
    with up(tmp_path, *arguments) as (port, lines):
        assert lines[-4] == f"llamalith: wrote {tmp_path}/etc/a.env; what follows is shown at this start only"
        assert status_with(port, dotenv_values(tmp_path / "etc" / "a.env", interpolate=False)["N8N_API_TOKEN"]) == 200
    assert list(tmp_path.rglob("*.env")) == [tmp_path / "etc" / "a.env"]
    (tmp_path / "etc" / "a.env").rename(tmp_path / ".env")
    refused = subprocess.run(
        [LLAMALITH, "up", *arguments], cwd=tmp_path, env=clean_environ(), capture_output=True, text=True, check=False
    )
    assert (refused.returncode, refused.stderr) == (
        2,
        f"--env-file: {tmp_path}/etc/a.env: there is no such file, and none is written since there are secrets in"
        f" {tmp_path}/.env\n",
    )
    assert not (tmp_path / "etc" / "a.env").exists()


def test_make_up_goes_on_with_the_env_file_of_the_data_directory(tmp_path: Path) -> None:
    (recipe,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "llamalith up" in line]
    arguments = recipe.partition("--data-dir")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".env").write_text(SECRETS)
    with up(tmp_path, *"".join(arguments[1:]).split()) as (port, _):
        assert status_with(port, "kV7-qz_0aT3p") == 200
    assert not (tmp_path / ".env").exists()


@pytest.mark.parametrize("command", ["web", "worker"])
def test_web_and_worker_alone_log_what_they_read_before_they_start(tmp_path: Path, command: str) -> None:
    (tmp_path / "a.env").write_text(SECRETS + f"REDIS_URL=unix://{tmp_path}/nobody.sock\n")
    # It ends by what it cannot use, after these lines.
    (tmp_path / "llamalith.db").write_text("no database")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.run(
            [LLAMALITH, command, "--data-dir", ".", "--env-file", "a.env"],
            cwd=tmp_path,
            env=clean_environ(),
            stderr=log,
            check=False,
        )
    assert process.returncode != 0
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    events = [json.loads(line)["event"].partition(":")[0] for line in lines]
    assert events[:3] == ["settings read", "N8N_API_TOKEN", "ADMIN_PASSWORD_HASH"]
