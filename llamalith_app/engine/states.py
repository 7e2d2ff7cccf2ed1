"""What slots held, kept in files: written when a slot's room is needed, read when the same prompt goes on.

A cache: any file may be missing, cut off, foreign or flipped at any time, and is then not used. llama.cpp ends the
process at a truncated state and takes a changed one for good, so all is checked before. One folder for all models
and workers of a machine. One thread looks, another one reads and writes. Knows no llama.cpp and no slots.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import msgspec

from llamalith_app.engine.sequence import State, own_memory
from llamalith_app.engine.slots import usable_prefix

MAGIC = b"llamalith state 2\n"
SUFFIX = ".state"
TOKEN_BYTES = 4
LITTER_S = 600
"""So old an unfinished file is one whose writer died."""
MAX_HEAD_BYTES = 64 * 1024 * 1024


class Head(msgspec.Struct, frozen=True):
    """After the magic: its own length and CRC-32 (4 bytes each, big-endian), then this as msgpack, then the data."""

    model: str
    """The fingerprint of model, context and llama.cpp, without which the data mean nothing."""
    tokens: bytes
    """Four bytes each, as this machine orders them."""
    least_cut: int
    """To so few of them, or any more, the model can cut it."""
    data_bytes: int
    data_crc: int


class Saved(NamedTuple):
    path: Path
    tokens: array[int]
    """Of four bytes each: there may be many thousands of states."""
    least_cut: int
    n_usable: int = 0
    """Of its leading tokens, for the prompt that it was found for."""


class States:
    """The states of one model. `fingerprint`: what must be equal for a state to fit."""

    def __init__(self, folder: Path, fingerprint: str, max_bytes: int) -> None:
        self._folder = folder
        self._model = hashlib.sha256(fingerprint.encode()).hexdigest()
        self._max_bytes = max_bytes
        self._known: dict[str, Saved] = {}
        """By file name."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._clean()

    def best(self, prompt: Sequence[int]) -> Saved | None:
        """The state that holds the most of the prompt's beginning; None: none holds any."""
        self._look()
        wanted = array("i", prompt[:-1])
        found = [saved._replace(n_usable=_n_usable(saved, wanted)) for saved in self._known.values()]
        best = max(found, key=lambda saved: saved.n_usable, default=None)
        return best if best is not None and best.n_usable else None

    def n_held(self, tokens: Sequence[int]) -> int:
        """How many leading tokens of these can be had from some state."""
        wanted = array("i", tokens)
        return max((_n_usable(saved, wanted) for saved in list(self._known.values())), default=0)

    def read(self, saved: Saved) -> State | None:
        """None: the file is gone or is not what it was written as; it is deleted then."""
        try:
            with saved.path.open("rb") as file:
                data = _read_data(file)
        except OSError:
            return None
        if data is None:
            _delete(saved.path)
            return None
        with contextlib.suppress(OSError):
            os.utime(saved.path)
        return State(saved.tokens.tolist(), data, saved.least_cut)

    def forget(self, tokens: list[int]) -> None:
        """The model does not take the state of these."""
        _delete(self._path(array("i", tokens)))

    def write(self, state: State, used_at: float | None = None) -> None:
        """Replaces states that can be had from this one; deletes those unused for longest above the limit, this one
        among them where it was used last at that time (of the wall clock; None: now)."""
        tokens, data, least_cut = state
        if len(data) > self._max_bytes:
            return
        held = array("i", tokens)
        head = msgspec.msgpack.encode(Head(self._model, held.tobytes(), least_cut, len(data), zlib.crc32(data)))
        path = self._path(held)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with open(unfinished, "wb", opener=_private) as file:
                file.writelines((MAGIC, len(head).to_bytes(4, "big"), zlib.crc32(head).to_bytes(4, "big"), head, data))
            used_at = time.time() if used_at is None else used_at
            os.utime(unfinished, (used_at, used_at))
            unfinished.replace(path)
        except OSError:
            # A full disk costs the next turn some seconds, and nothing else.
            _delete(unfinished)
            return
        for saved in list(self._known.values()):
            n_tokens = len(saved.tokens)
            if saved.path != path and least_cut <= n_tokens and saved.tokens == held[:n_tokens]:
                _delete(saved.path)
        self._make_room()

    def _path(self, tokens: array[int]) -> Path:
        return self._folder / f"{self._prefix}{hashlib.sha256(tokens.tobytes()).hexdigest()[:24]}{SUFFIX}"

    @property
    def _prefix(self) -> str:
        return f"{self._model[:16]}-"

    def _look(self) -> None:
        """Other workers write and delete here as well."""
        names = {entry.name for entry in self._entries() if entry.name.startswith(self._prefix)}
        for name in self._known.keys() - names:
            del self._known[name]
        for name in names - self._known.keys():
            path = self._folder / name
            try:
                with path.open("rb") as file:
                    head = _read_head(file)
            except OSError:
                continue
            if head is None or head.model != self._model or len(head.tokens) % TOKEN_BYTES:
                _delete(path)
                continue
            self._known[name] = Saved(path, array("i", head.tokens), head.least_cut)

    def _clean(self) -> None:
        for path in self._folder.glob("*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > LITTER_S:
                    path.unlink()

    def _make_room(self) -> None:
        self._clean()
        found = []
        for entry in self._entries():
            with contextlib.suppress(OSError):
                status = entry.stat()
                found.append((status.st_mtime_ns, status.st_size, entry.path))
        n_bytes = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if n_bytes <= self._max_bytes:
                return
            _delete(Path(path))
            n_bytes -= size

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        with contextlib.suppress(OSError), os.scandir(self._folder) as entries:
            yield from [entry for entry in entries if entry.name.endswith(SUFFIX)]


def _read_head(file: IO[bytes]) -> Head | None:
    start = file.read(len(MAGIC) + 8)
    length, crc = int.from_bytes(start[-8:-4], "big"), int.from_bytes(start[-4:], "big")
    if not start.startswith(MAGIC) or len(start) != len(MAGIC) + 8 or length > MAX_HEAD_BYTES:
        return None
    body = file.read(length)
    if len(body) != length or zlib.crc32(body) != crc:
        return None
    try:
        return msgspec.msgpack.decode(body, type=Head)
    except msgspec.MsgspecError:
        return None


def _read_data(file: IO[bytes]) -> memoryview | None:
    """None: the file is not what it was written as."""
    head = _read_head(file)
    # Before there is room for it: only what is there can be right.
    if head is None or not head.data_bytes or file.tell() + head.data_bytes != os.fstat(file.fileno()).st_size:
        return None
    data = own_memory(head.data_bytes)
    n_read = file.readinto(data)  # type: ignore[attr-defined]
    return data if n_read == head.data_bytes and zlib.crc32(data) == head.data_crc else None


def _n_usable(saved: Saved, wanted: array[int]) -> int:
    return usable_prefix(saved.tokens, wanted, saved.least_cut)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
