"""`llamalith init` and `llamalith hash-password`: strong secrets, written atomically for the owner, shown once."""

from __future__ import annotations

import os
import pty
import stat
import subprocess
import sys
import threading
from pathlib import Path

import bcrypt
import pytest
from click.testing import CliRunner

from llamalith_app.commands import hash_password, init
from llamalith_app.commands.init import Generated, write_env
from llamalith_app.errors import ConfigError
from llamalith_app.settings.load import load
from llamalith_app.settings.secret_checks import BCRYPT_HASH, require_secrets

PASSWORD = "correct horse 🐴"


@pytest.fixture
def cheap_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are not about how hard a hash is to compute: that takes a fifth of a second."""
    monkeypatch.setattr(hash_password, "BCRYPT_COST", 6)


def test_init_writes_an_env_file_that_web_and_worker_accept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(init.command)
    assert result.exit_code == 0
    config = load({})
    require_secrets(config)
    written, password, token = result.stdout.splitlines()
    assert written == f"wrote {tmp_path}/.env; what follows is shown this once"
    assert token == f"API token       {config.api_token}"
    assert config.api_token.startswith("llm_")
    assert bcrypt.checkpw(password.split()[-1].encode(), config.admin_password_hash.encode())
    assert config.admin_password_hash.startswith("$2b$12$")
    assert password.split()[-1] not in (tmp_path / ".env").read_text()


@pytest.mark.usefixtures("cheap_hashes")
def test_a_shell_reads_the_same_secrets_from_the_file(tmp_path: Path) -> None:
    generated = write_env(tmp_path / ".env")
    script = 'set -a; . ./.env; printf "%s\\n%s" "$N8N_API_TOKEN" "$ADMIN_PASSWORD_HASH"'
    run = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    token, password_hash = run.stdout.split("\n")
    assert token == generated.token
    assert bcrypt.checkpw(generated.password.encode(), password_hash.encode())


@pytest.mark.usefixtures("cheap_hashes")
def test_only_the_owner_can_read_the_file_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_env(tmp_path / ".env")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600


@pytest.mark.usefixtures("cheap_hashes")
def test_an_existing_file_is_kept_without_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("MINE=1\n")
    result = CliRunner().invoke(init.command)
    assert isinstance(result.exception, ConfigError)
    assert result.exception.problems == [f"{tmp_path}/.env: is there already; --force replaces it"]
    assert (tmp_path / ".env").read_text() == "MINE=1\n"
    assert CliRunner().invoke(init.command, ["--force"]).exit_code == 0
    require_secrets(load({}))
    assert [path.name for path in tmp_path.iterdir()] == [".env"]


@pytest.mark.usefixtures("cheap_hashes")
def test_of_two_at_once_one_writes_and_the_other_fails(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    together = threading.Barrier(2)
    won: list[Generated] = []
    refused: list[ConfigError] = []

    def write() -> None:
        together.wait()
        try:
            won.append(write_env(path))
        except ConfigError as error:
            refused.append(error)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 1)
    assert load({}, cwd=tmp_path).api_token == won[0].token
    assert [left.name for left in tmp_path.iterdir()] == [".env"]


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere/\.env: cannot be written: No such file or directory"):
        write_env(tmp_path / "nowhere" / ".env")


@pytest.mark.usefixtures("cheap_hashes")
def test_init_with_a_data_directory_writes_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(init.command, ["--data-dir", "state"])
    assert (result.exit_code, result.stderr) == (0, "")
    require_secrets(load({}, data_dir=Path("state")))
    (tmp_path / ".env").write_text("MINE=1\n")
    again = CliRunner().invoke(init.command, ["--data-dir", "state", "--force"])
    assert (
        again.stderr
        == f"note: from this folder {tmp_path}/.env is read instead, unless --env-file {tmp_path}/state/.env is given\n"
    )


@pytest.mark.usefixtures("cheap_hashes")
def test_init_with_an_env_file_writes_there_whatever_else_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(init.command, ["--env-file", "etc/a.env", "--data-dir", "state"])
    assert (result.exit_code, result.stderr) == (0, "")
    require_secrets(load({}, env_file=Path("etc/a.env")))
    assert [path.name for path in tmp_path.rglob("*")] == ["etc", "a.env"]


@pytest.mark.usefixtures("cheap_hashes")
def test_hash_password_reads_one_line_and_prints_only_the_hash() -> None:
    result = CliRunner().invoke(hash_password.command, input=f"{PASSWORD}\r\nanother line\n")
    assert result.stderr == ""
    printed = result.stdout.removesuffix("\n")
    assert BCRYPT_HASH.fullmatch(printed)
    assert bcrypt.checkpw(PASSWORD.encode(), printed.encode())


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (b"", "the password is empty"),
        (b"\n", "the password is empty"),
        (b"x" * 73 + b"\n", "the password has 73 bytes; bcrypt takes at most 72"),
        ("ä".encode() * 37, "the password has 74 bytes; bcrypt takes at most 72"),
        (b"\xff\n", "the password is not UTF-8 text"),
        (b"a\0b\n", "the password holds a control character"),
        (b"a\n", "the password can be guessed within a day; take a longer one, or several rare words"),
        (b"admin1234\n", "the password can be guessed within a day; take a longer one, or several rare words"),
    ],
)
def test_a_password_that_bcrypt_or_a_form_cannot_take_is_refused(given: bytes, problem: str) -> None:
    result = CliRunner().invoke(hash_password.command, input=given)
    assert isinstance(result.exception, ConfigError)
    assert result.exception.problems == [problem]
    assert result.output == ""


@pytest.mark.usefixtures("cheap_hashes")
def test_a_short_password_is_accepted_with_a_warning() -> None:
    result = CliRunner().invoke(hash_password.command, input="kV7-qz_0a\n")
    assert result.stderr == "warning: the password has 9 characters; 10 or more are usual\n"
    assert BCRYPT_HASH.fullmatch(result.stdout.strip())


@pytest.mark.usefixtures("cheap_hashes")
def test_the_longest_password_is_accepted() -> None:
    password = b"correct horse battery staple, and once again: a horse, now with a rider."
    assert bcrypt.checkpw(password, hash_password.hashed(password).encode())


@pytest.mark.slow
def test_on_a_terminal_the_password_is_asked_for_twice_and_not_shown() -> None:
    terminal, its_end = pty.openpty()
    program = [sys.executable, "-m", "llamalith_app.cli", "hash-password"]
    process = subprocess.Popen(
        # Makes this the controlling terminal of the program.
        ["setsid", "--ctty", "--wait", *program],
        stdin=its_end,
        stdout=subprocess.PIPE,
        stderr=its_end,
        text=True,
    )
    os.close(its_end)
    shown = b""
    try:
        for asked in (b"Password: ", b"confirmation: "):
            while not shown.endswith(asked):
                shown += os.read(terminal, 1024)
            os.write(terminal, f"{PASSWORD}\n".encode())
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(terminal)
    assert process.returncode == 0
    assert bcrypt.checkpw(PASSWORD.encode(), printed.strip().encode())
    assert PASSWORD.encode() not in shown
