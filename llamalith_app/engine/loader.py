"""Loads a model file with llama.cpp, and says in a sentence why one cannot be loaded.

Owns the validation of the file, and llama.cpp's log: warnings and errors go to stderr, where the worker reads them. The
runner calls it once. Knows neither contexts nor slots.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import stat
import struct
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp

from llamalith_app.engine.messages import GpuOffload, LoadModel
from llamalith_app.engine.runner_protocol import CannotLoad

HASH_CHUNK_BYTES = 1 << 20
LOG_LEVEL_ERROR = 4
LOG_LEVELS_SHOWN = (3, LOG_LEVEL_ERROR)
"""Warnings and errors, as ggml.h numbers them. llama-cpp-python's own names for the levels are one off."""
LOAD_ERROR = "error loading model: "
GENERAL = "failed to load "
FUNCTION = re.compile(r"^(?:[a-z]\w*_\w+: )+")
"""The names of functions at the beginning of most log lines."""
PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
GGUF_HEAD = struct.Struct("<4sIQQ")
"""Magic, version, number of tensors, number of keys."""
MAX_REASON_CHARS = 300

OFFLOADED = re.compile(rb"offloaded (\d+)/(\d+) layers to GPU")
"""llama.cpp has no function for it. It logs this line in each load, unless it finds no GPU."""
_offloaded: deque[tuple[int, int]] = deque(maxlen=1)
"""Layers on a GPU and layers of the model, as the last load logged them."""
_errors: deque[bytes] = deque(maxlen=100)
"""Errors that llama.cpp logged since the load began, in pieces of lines."""


def validate_model_file(load: LoadModel) -> None:
    """Raises CannotLoad for what can be found without llama.cpp, which may abort the process at a file that is no GGUF.
    Reads the whole file if its SHA-256 is pinned."""
    path = Path(load.path)
    named = f"The file of model {load.model} ({load.path})"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CannotLoad(f"{named} is not a file.")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CannotLoad(f"{named} is not a GGUF file.")
            if load.sha256 is None:
                return
            file.seek(0)
            digest = hashlib.sha256()
            while chunk := file.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise CannotLoad(f"{named} cannot be read: {error.strerror}.") from None
    if digest.hexdigest() != load.sha256:
        raise CannotLoad(f"{named} is not the one that was pinned: its SHA-256 is {digest.hexdigest()}.")


def file_digest(load: LoadModel) -> str:
    """A text that differs for another file: the pinned SHA-256, or size, time and both ends of the file, so that nobody
    reads gigabytes. Raises OSError."""
    if load.sha256 is not None:
        return load.sha256
    path = Path(load.path)
    status = path.stat()
    with path.open("rb") as file:
        head = file.read(HASH_CHUNK_BYTES)
        file.seek(max(0, status.st_size - HASH_CHUNK_BYTES))
        ends = hashlib.sha256(head + file.read(HASH_CHUNK_BYTES)).hexdigest()
    return f"{status.st_size} {status.st_mtime_ns} {ends}"


def load_model(load: LoadModel, report: Callable[[float], None]) -> Any:
    """Returns llama.cpp's model. Reports the progress, from 0 to 1. Raises CannotLoad."""
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = load.n_gpu_layers

    def on_progress(progress: float, _: object) -> bool:
        report(progress)
        return True

    params.progress_callback = llama_cpp.llama_progress_callback(on_progress)
    _errors.clear()
    _offloaded.clear()
    model = llama_cpp.llama_model_load_from_file(os.fsencode(load.path), params)
    if not model:
        raise CannotLoad(
            f"llama.cpp cannot load the file of model {load.model} ({load.path}): {_why_not_loaded(load.path)}."
        )
    return model


def gpu_offload(requested: int) -> GpuOffload | None:
    """What the last load put onto a GPU. None: nothing was requested and no GPU holds anything."""
    n_layers, n_layers_total = _offloaded[-1] if _offloaded else (0, 0)
    if not (requested or n_layers):
        return None
    return GpuOffload(requested=requested, n_layers=n_layers, n_layers_total=n_layers_total)


def _why_not_loaded(path: str) -> str:
    """One line: llama.cpp's own words, unless the file's header gives a better reason."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(GGUF_HEAD.size)
        if len(head) == GGUF_HEAD.size and GGUF_HEAD.unpack(head)[2] == 0 and not PART.search(path):
            return "it holds a vocabulary and no weights"
    lines = [" ".join(line.split()) for line in b"".join(_errors).decode(errors="replace").splitlines()]
    reasons = [line.partition(LOAD_ERROR)[2] for line in lines if LOAD_ERROR in line]
    # For a file that it cannot even read, llama.cpp logs the cause first, and then only that loading failed.
    reason = reasons[0] if reasons and GENERAL not in reasons[0] else next(iter(lines), "")
    reason = FUNCTION.sub("", reason).rstrip(". ")
    if not reason:
        return "it is damaged, or of a kind that this version does not know"
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in reason)
    return shown if len(shown) <= MAX_REASON_CHARS else f"{shown[:MAX_REASON_CHARS]}…"


def redirect_logs() -> None:
    """Makes llama.cpp log through this module. Call it before anything else of llama.cpp."""
    llama_cpp.llama_log_set(_native_log, ctypes.c_void_p())


def _log_problems(level: int, text: bytes, _: object) -> None:
    if level in LOG_LEVELS_SHOWN:
        os.write(2, text)
    if level == LOG_LEVEL_ERROR:
        _errors.append(text)
    if found := OFFLOADED.search(text):
        _offloaded.append((int(found[1]), int(found[2])))


_native_log = llama_cpp.llama_log_callback(_log_problems)
"""A global, because llama.cpp keeps only a pointer to it."""
