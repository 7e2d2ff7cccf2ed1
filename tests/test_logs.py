"""What a process does whose lines nobody can take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.product.conftest import LLAMALITH

LOG = """
import logging, pathlib, structlog
from llamalith_app import logs
from llamalith_app.config import Config
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
def test_a_line_that_cannot_be_written_is_lost_and_nothing_else_with_it(form: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", LOG.format(form=form)], stdout=subprocess.PIPE, stderr=full, check=False
        )
    assert done.stdout == b"went on\n"


def test_a_folder_that_cannot_be_used_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "llamalith.db").mkdir()
    done = subprocess.run(
        [LLAMALITH, "migrate", "--data-dir", tmp_path], stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode in (1, 2)
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_folder_may_have_the_signs_of_urls_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "a?b#c %20"
    for command in ("migrate", "check"):
        subprocess.run([LLAMALITH, command, "--data-dir", folder], check=True)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert (folder / "llamalith.db").exists()


def test_a_command_does_its_work_where_nobody_can_take_what_it_says(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([LLAMALITH, "migrate", "--data-dir", tmp_path], stdout=full, stderr=full, check=False)
    assert done.returncode == 0
    assert (tmp_path / "llamalith.db").exists()
