"""pip_install.py TITLE LOG PIP-ARGUMENT...: runs `pip install`, shows its progress and writes its output to LOG.

Called by the Makefile. Does not know what is installed. Uses the standard library only, because it runs before any
dependency is installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

EVERY_S = 10
TAIL_LINES = 40
NINJA_STEP = re.compile(r"^\s*\[(\d+)/(\d+)\] ")
WHEEL = re.compile(r"^Building wheel for (\S+) ")


class Progress:
    """The progress of an installation, read from pip's output."""

    def __init__(self) -> None:
        self._n_found = 0
        self._building = ""
        self._step = ""

    def read(self, line: str) -> None:
        if line.startswith("Collecting "):
            self._n_found += 1
        elif wheel := WHEEL.match(line.strip()):
            self._building = wheel[1].replace("llama-cpp-python", "llama.cpp")
            self._step = "starting"
        elif step := NINJA_STEP.match(line):
            self._step = f"{step[1]} of {step[2]} files"
        elif line.startswith("Installing collected packages"):
            self._building, self._step = "", "unpacking"

    def __str__(self) -> str:
        if self._building:
            return f"building {self._building}: {self._step}"
        return self._step or f"downloading: {self._n_found} packages so far"


def follow(lines: IO[str], log: IO[str], progress: Progress) -> None:
    for line in lines:
        log.write(line)
        log.flush()
        progress.read(line)


def in_words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def main(title: str, log_path: Path, arguments: list[str]) -> int:
    started = time.monotonic()
    print(f"{title} (log: {log_path})", flush=True)
    definition = f"CMAKE_PROJECT_llama_cpp_INCLUDE={Path(__file__).with_name('llama.cmake')}"
    progress = Progress()
    with (
        log_path.open("w", encoding="utf-8") as log,
        subprocess.Popen(
            [sys.executable, "-m", "pip", "install", "-v", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | {"SKBUILD_CMAKE_DEFINE": definition, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        ) as pip,
    ):
        reader = threading.Thread(target=follow, args=(pip.stdout, log, progress))
        reader.start()
        while True:
            try:
                code = pip.wait(EVERY_S)
                break
            except subprocess.TimeoutExpired:
                print(f"  {progress} ({in_words(time.monotonic() - started)})", flush=True)
        reader.join()
    took = in_words(time.monotonic() - started)
    if code:
        tail = log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        print("\n".join(tail), file=sys.stderr)
        print(f"{title}: failed after {took}; the whole log: {log_path}", file=sys.stderr)
    else:
        print(f"  done in {took}", flush=True)
    return code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
    except KeyboardInterrupt:
        sys.exit(130)
