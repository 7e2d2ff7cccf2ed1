"""Programs and files of the system that some tests need. Where one is missing, they are skipped or fail."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest


def need(program: str, package: str) -> str:
    """Its path. Skips the test where it is missing, or fails it where LLAMALITH_REQUIRE_ALL=1."""
    # Debian keeps the programs of a PostgreSQL server beside the PATH, in a folder for each version.
    folders = [os.environ.get("PATH", ""), "/usr/sbin", *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    path = shutil.which(program, path=":".join(folders))
    if path is None:
        _miss(f"{program} is not here (Debian: apt-get install {package})")
    return path


def need_file(path: Path, package: str) -> Path:
    """The same for a file that a package brings."""
    if not path.exists():
        _miss(f"{path} is not here (Debian: apt-get install {package})")
    return path


def _miss(reason: str) -> NoReturn:
    if os.environ.get("LLAMALITH_REQUIRE_ALL") == "1":
        pytest.fail(f"{reason}, and LLAMALITH_REQUIRE_ALL=1 wants every test to run")
    pytest.skip(reason)
