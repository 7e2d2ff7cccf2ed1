"""Builds llama.cpp's own server from the very sources that the product's engine is built from.

    .venv/bin/python -m bench.llama_server FOLDER

FOLDER/bin/llama-server is there afterwards; some 5 minutes on two cores. The sources are those inside the source
package of the llama-cpp-python that `requirements/runtime.lock` pins, and the flags those of the product's build, with
the server added: `scripts/llama.cmake` says what is left out there. Run by the Makefile.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements/runtime.lock"
BIN = Path(sys.executable).parent
CXX, NICE = (shutil.which(name) or name for name in ("c++", "nice"))
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_SERVER=ON",
)
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
"""As in `scripts/llama.cmake`, where the compiler knows them."""


def pinned() -> str:
    """The requirement of the engine's library, such as `llama-cpp-python==0.3.36`."""
    found = re.search(r"^llama-cpp-python==\S+", LOCK.read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"{LOCK} pins no llama-cpp-python")
    return found[0]


def knows_amx() -> bool:
    tried = subprocess.run([CXX, *NO_AMX.split(), "-E", "-x", "c++", "/dev/null"], capture_output=True, check=False)
    return tried.returncode == 0


def build(folder: Path) -> None:
    flags = [*FLAGS, f"-DCMAKE_C_FLAGS={NO_AMX}", f"-DCMAKE_CXX_FLAGS={NO_AMX}"] if knows_amx() else list(FLAGS)
    with tempfile.TemporaryDirectory(prefix="llama-server-") as temporary:
        sources = Path(temporary)
        fetch = ("-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-binary", ":all:")
        subprocess.run(
            [sys.executable, *fetch, "--no-deps", "--no-build-isolation", "--dest", str(sources), pinned()], check=True
        )
        with tarfile.open(next(sources.glob("*.tar.gz"))) as package:
            package.extractall(sources, filter="data")
        llama = next(sources.glob("*/vendor/llama.cpp"))
        # CMake refuses a folder that it began for sources elsewhere.
        shutil.rmtree(folder, ignore_errors=True)
        configure = ("cmake", "-S", str(llama), "-B", str(folder), "-G", "Ninja", *flags)
        for command in (configure, ("cmake", "--build", str(folder), "--target", "llama-server")):
            # Whatever names a compiler and its options counts, as in the engine's own build.
            subprocess.run([NICE, *command], check=True, env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"})


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve())
