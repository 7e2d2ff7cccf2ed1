"""States of slots in files: written when a slot is needed for another sequence, read when the same prompt continues.

Owns the file format and the limit on the folder's size. The engine's loop uses it from two threads: its main thread
searches, its disk thread reads and writes. One folder serves all models and workers of a machine. Knows neither
llama.cpp nor the slot table.

The folder is a cache. A file may be missing, truncated, foreign or damaged at any time, and is not used then.
llama.cpp aborts the process at a truncated state and accepts a changed one, so every byte is checked before.
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

from llamalith_app.engine.sequence import SlotState, anonymous_memory
from llamalith_app.engine.slots import usable_prefix

MAGIC = b"llamalith state 2\n"
SUFFIX = ".state"
TOKEN_BYTES = 4
UNFINISHED_S = 600
"""Seconds after which an unfinished file is deleted: its writer has died."""
MAX_HEADER_BYTES = 64 * 1024 * 1024


class StateHeader(msgspec.Struct, frozen=True):
    """The header of a file. A file consists of MAGIC, the header's length and CRC-32 (4 bytes each, big-endian), the
    header as msgpack, and the data."""

    model: str
    """SHA-256 of the runner's fingerprint: the data fits no other model, context or version of llama.cpp."""
    tokens: bytes
    """Four bytes a token, in this machine's byte order."""
    least_cut: int
    """As in `SlotState`."""
    data_bytes: int
    data_crc: int


class SavedState(NamedTuple):
    """A state on disk, without its data."""

    path: Path
    tokens: array[int]
    """An array takes four bytes a token, a list far more, and there may be thousands of states."""
    least_cut: int
    n_usable: int = 0
    """Leading tokens that the prompt of a search can reuse; 0 before a search."""


class StateStore:
    """The states of one model in `folder`, which is made if need be. A state fits a model with the same `fingerprint`.
    `max_bytes` limits all files of the folder together. Raises OSError if the folder cannot be made."""

    def __init__(self, folder: Path, fingerprint: str, max_bytes: int) -> None:
        self._folder = folder
        self._model = hashlib.sha256(fingerprint.encode()).hexdigest()
        self._max_bytes = max_bytes
        self._found: dict[str, SavedState] = {}
        """File name -> state, as the folder was at the last refresh."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._delete_unfinished()

    def best(self, prompt: Sequence[int]) -> SavedState | None:
        """The state that shares the longest prefix with the prompt; None: no state shares any."""
        self._refresh()
        wanted = array("i", prompt[:-1])
        found = [saved._replace(n_usable=_n_usable(saved, wanted)) for saved in self._found.values()]
        best = max(found, key=lambda saved: saved.n_usable, default=None)
        return best if best is not None and best.n_usable else None

    def n_restorable(self, tokens: Sequence[int]) -> int:
        """How many leading tokens of these a state on disk can restore."""
        wanted = array("i", tokens)
        return max((_n_usable(saved, wanted) for saved in list(self._found.values())), default=0)

    def read(self, saved: SavedState) -> SlotState | None:
        """Reads the data; None: the file is gone, or it is damaged and now deleted."""
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
        return SlotState(saved.tokens.tolist(), data, saved.least_cut)

    def forget(self, tokens: list[int]) -> None:
        """Deletes the state of these tokens: llama.cpp did not accept it."""
        _delete(self._path(array("i", tokens)))

    def write(self, state: SlotState, used_at: float | None = None) -> None:
        """Writes a state, and deletes the states that it replaces: those that can be cut out of it. If the folder is
        above its limit, deletes the least recently used states. `used_at`: when the slot was used last, in seconds of
        the wall clock; None: now. Errors of the disk are ignored."""
        tokens, data, least_cut = state
        if len(data) > self._max_bytes:
            return
        held = array("i", tokens)
        header = msgspec.msgpack.encode(
            StateHeader(self._model, held.tobytes(), least_cut, len(data), zlib.crc32(data))
        )
        path = self._path(held)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with open(unfinished, "wb", opener=_open_private) as file:
                file.writelines(
                    (MAGIC, len(header).to_bytes(4, "big"), zlib.crc32(header).to_bytes(4, "big"), header, data)
                )
            used_at = time.time() if used_at is None else used_at
            os.utime(unfinished, (used_at, used_at))
            unfinished.replace(path)
        except OSError:
            # A full disk costs the next turn some seconds of prefill, and nothing else.
            _delete(unfinished)
            return
        for saved in list(self._found.values()):
            n_tokens = len(saved.tokens)
            if saved.path != path and least_cut <= n_tokens and saved.tokens == held[:n_tokens]:
                _delete(saved.path)
        self._make_room()

    def _path(self, tokens: array[int]) -> Path:
        return self._folder / f"{self._prefix}{hashlib.sha256(tokens.tobytes()).hexdigest()[:24]}{SUFFIX}"

    @property
    def _prefix(self) -> str:
        return f"{self._model[:16]}-"

    def _refresh(self) -> None:
        """Reads which states there are: other workers write and delete in the same folder."""
        names = {entry.name for entry in self._entries() if entry.name.startswith(self._prefix)}
        for name in self._found.keys() - names:
            del self._found[name]
        for name in names - self._found.keys():
            path = self._folder / name
            try:
                with path.open("rb") as file:
                    header = _read_header(file)
            except OSError:
                continue
            if header is None or header.model != self._model or len(header.tokens) % TOKEN_BYTES:
                _delete(path)
                continue
            self._found[name] = SavedState(path, array("i", header.tokens), header.least_cut)

    def _delete_unfinished(self) -> None:
        for path in self._folder.glob("*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > UNFINISHED_S:
                    path.unlink()

    def _make_room(self) -> None:
        self._delete_unfinished()
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


def _read_header(file: IO[bytes]) -> StateHeader | None:
    start = file.read(len(MAGIC) + 8)
    length, crc = int.from_bytes(start[-8:-4], "big"), int.from_bytes(start[-4:], "big")
    if not start.startswith(MAGIC) or len(start) != len(MAGIC) + 8 or length > MAX_HEADER_BYTES:
        return None
    body = file.read(length)
    if len(body) != length or zlib.crc32(body) != crc:
        return None
    try:
        return msgspec.msgpack.decode(body, type=StateHeader)
    except msgspec.MsgspecError:
        return None


def _read_data(file: IO[bytes]) -> memoryview | None:
    """The data; None: the file is damaged."""
    header = _read_header(file)
    # Checked before memory is taken: the length may be damaged, too.
    if header is None or not header.data_bytes or file.tell() + header.data_bytes != os.fstat(file.fileno()).st_size:
        return None
    data = anonymous_memory(header.data_bytes)
    n_read = file.readinto(data)  # type: ignore[attr-defined]
    return data if n_read == header.data_bytes and zlib.crc32(data) == header.data_crc else None


def _n_usable(saved: SavedState, wanted: array[int]) -> int:
    return usable_prefix(saved.tokens, wanted, saved.least_cut)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
