"""Which module may import which: the contracts in pyproject.toml, and what really gets imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llamalith_app

ROOT = Path(__file__).parents[1]


def loaded_by(module: str) -> set[str]:
    """The packages and our own modules that a fresh interpreter has loaded after importing this one."""
    code = f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names = json.loads(run.stdout.splitlines()[-1])
    return {name for name in names if name.startswith("llamalith_app.")} | {name.split(".")[0] for name in names}


def test_every_import_contract_holds() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([program, "--no-cache"], check=False, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


OF_ONE_KIND = ("commands", "contracts", "controllers", "guards", "versions")
"""Packages of many modules that are alike: the map says what they are, and names no module."""


def test_the_map_names_every_package_and_every_module() -> None:
    shown = (llamalith_app.__doc__ or "").partition("Beside the package")[0]
    package = ROOT / "llamalith_app"
    paths = [path.relative_to(package) for path in package.rglob("*.py")]
    packages = {f"{path.parent.name}/" for path in paths if path.name == "__init__.py"} - {"/"}
    names = {path.stem for path in paths if not set(path.parts) & {*OF_ONE_KIND, "env.py"} and path.stem[0] != "_"}
    assert {name for name in packages if name not in shown} == set()
    assert {name for name in names if not re.search(rf"\b{name}\b", shown)} == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("llamalith_app.app", {"llama_cpp", "llamalith_app.engine.runner", "llamalith_app.jobs.worker.attempt"}),
        (
            "llamalith_app.commands.web",
            {"llama_cpp", "llamalith_app.engine.runner", "llamalith_app.jobs.worker.process"},
        ),
        ("llamalith_app.commands.worker", {"llama_cpp", "llamalith_app.app", "llamalith_app.guards"}),
        ("llamalith_app.engine.child", {"litestar", "redis", "saq", "sqlalchemy", "llamalith_app.store"}),
        ("llamalith_app.commands.up", {"litestar", "llama_cpp", "redis", "saq", "sqlalchemy", "uvicorn"}),
        (
            "llamalith_app.cli",
            {"litestar", "llama_cpp", "redis", "saq", "sqlalchemy", "uvicorn", "structlog"},
        ),
        ("llamalith_app.jobs.submit", {"llamalith_app.engine", "llama_cpp"}),
    ],
)
def test_importing_a_process_loads_nothing_of_the_others(module: str, never: set[str]) -> None:
    assert loaded_by(module) & never == set()
