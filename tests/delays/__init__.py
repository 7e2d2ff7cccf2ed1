"""A pytest plugin: the suite with random delays in event loops and threads. `make delays` runs it.

By the seed that the report's head names, and anew for each test, so that a test alone meets the delays it met among
the others. The processes that a test starts have them, too: they inherit a PYTHONPATH with the folder of
`sitecustomize.py`. What the machine itself decides stays its own: the same seed makes a failure likely, not certain.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

SEED = "DELAYS_SEED"
FOLDER = str(Path(__file__).parent)


def _delayed() -> ModuleType:
    """This process, from here on. One that inherited the environment is delayed since its start."""
    os.environ.setdefault(SEED, str(random.randrange(1_000_000)))
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if FOLDER not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([FOLDER, *filter(None, paths)])
    started = sys.modules.get("sitecustomize")
    if started is not None and hasattr(started, "CHANCE"):
        return started
    from tests.delays import sitecustomize  # noqa: PLC0415 - importing it is what delays this process

    return sitecustomize


_delays = _delayed()


def pytest_report_header() -> str:
    return f"random delays: make delays SEED={os.environ[SEED]}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _delays.CHANCE.seed(f"{os.environ[SEED]} {item.nodeid}")
