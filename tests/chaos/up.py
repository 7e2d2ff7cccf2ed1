"""`llamalith up` whose worker uses the fake engine; everything else is the product's.

python -m tests.chaos.up SCRIPT MODELS UP'S OWN OPTIONS...
"""

from __future__ import annotations

import sys

from llamalith_app import cli
from llamalith_app.supervise import up

command = up.command


def with_fake_engine(*arguments: str) -> tuple[str, ...]:
    if arguments[0] != "worker":
        return command(*arguments)
    return (sys.executable, "-m", "tests.chaos.worker", *arguments[1:], "--script", script, "--models", models)


if __name__ == "__main__":
    _, script, models, *options = sys.argv
    sys.argv = ["llamalith", "up", *options]
    up.command = with_fake_engine
    cli.main()
