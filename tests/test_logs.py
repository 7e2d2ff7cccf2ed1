"""Log lines and output: their format, and what happens when they cannot be written."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.product.conftest import LLAMALITH

pytestmark = pytest.mark.slow

LOG = """
import logging, pathlib, structlog
from llamalith_app import logs
from llamalith_app.settings.config import Config
logs.start("worker", Config(data_dir=pathlib.Path("unused"), log_format="{form}"))
log = structlog.get_logger()
for _ in range(3):
    log.info("a line")
    try:
        raise ValueError("of another")
    except ValueError:
        log.exception("a failure")
    logging.getLogger("a library").error("its line")
print("went on")
"""


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_line_that_cannot_be_written_is_dropped_and_stops_nothing(form: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", LOG.format(form=form)], stdout=subprocess.PIPE, stderr=full, check=False
        )
    assert done.stdout == b"went on\n"


def test_a_folder_that_cannot_be_used_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "llamalith.db").mkdir()
    done = subprocess.run(
        [LLAMALITH, "migrate", "--data-dir", tmp_path], stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode in (1, 2)
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_folder_may_have_characters_of_urls_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "a?b#c %20"
    for command in ("migrate", "check"):
        subprocess.run([LLAMALITH, command, "--data-dir", folder], check=True)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert (folder / "llamalith.db").exists()


def test_a_command_does_its_work_when_its_output_cannot_be_written(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([LLAMALITH, "migrate", "--data-dir", tmp_path], stdout=full, stderr=full, check=False)
    assert done.returncode == 0
    assert (tmp_path / "llamalith.db").exists()


LINES = """
import pathlib, structlog
from llamalith_app import logs
from llamalith_app.settings.config import Config
logs.start("web", Config(data_dir=pathlib.Path("unused"), log_format="text", log_level="{level}"))
structlog.contextvars.bind_contextvars(request_id="r")
log = structlog.get_logger()
log.info("request", principal="none", ms=3.2, status={status}, route="/chat/", method="GET")
log.warning("refused", reason="one\\nlevel=info \\x1b[31m\\u202etwo")
"""


def text_lines(on: int, *, stdout: int | None = None, status: int = 200, level: str = "info", **environ: str) -> None:
    script = LINES.format(status=status, level=level)
    subprocess.run(
        [sys.executable, "-c", script],
        stdout=subprocess.DEVNULL if stdout is None else stdout,
        stderr=on,
        env={**os.environ, **environ},
        check=True,
    )


def on_a_terminal(*, stdout_too: bool = True, status: int = 200, level: str = "info", **environ: str) -> str:
    ours, theirs = pty.openpty()
    text_lines(theirs, stdout=theirs if stdout_too else None, status=status, level=level, **environ)
    os.close(theirs)
    output = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(ours, 65536):
            output += part
    os.close(ours)
    return output.decode()


def test_text_lines_begin_with_the_important_fields_and_a_value_cannot_break_them(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        text_lines(file.fileno())
    request, refused = (tmp_path / "log").read_text().splitlines()
    assert request.split("request ", 1)[1].split() == [
        *("process=web", "method=GET", "route=/chat/", "status=200", "ms=3.2", "principal=none", "request_id=r")
    ]
    assert (tmp_path / "log").read_text().isascii()
    assert "two" in refused


def test_text_is_coloured_on_a_terminal_only_and_never_under_no_color(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        text_lines(file.fileno(), NO_COLOR="")
    assert "\x1b" not in (tmp_path / "log").read_text()
    assert "\x1b[" in on_a_terminal(NO_COLOR="")
    assert "\x1b" not in on_a_terminal(NO_COLOR="1")


def test_a_terminal_shows_no_request_that_succeeded_and_all_else() -> None:
    assert "request " not in (shown := on_a_terminal(NO_COLOR="1"))
    assert "refused" in shown
    assert "status=401" in on_a_terminal(status=401, NO_COLOR="1")
    assert "status=200" in on_a_terminal(level="debug", NO_COLOR="1")


def test_requests_are_logged_where_standard_output_is_no_terminal() -> None:
    assert "status=200" in on_a_terminal(stdout_too=False, NO_COLOR="1")
