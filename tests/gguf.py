"""GGUF files made by hand: a header that says what a test wants, and as many bytes behind it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 4096,
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tokenizer.ggml.tokens": ["a", "bc", ""],
    "tokenizer.ggml.scores": [0.0, 1.0, 2.0],
    "tokenizer.chat_template": "x" * 1000,
    "general.is_old": True,
}


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def item(value: Any) -> tuple[int, bytes]:
    """The type of a value and its bytes."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return (4, struct.pack("<I", value)) if value < 2**32 else (10, struct.pack("<Q", value))
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, text(value)
    items = [item(one) for one in value]
    return 9, struct.pack("<IQ", items[0][0], len(items)) + b"".join(data for _, data in items)


def header(values: dict[str, Any], *, version: int = 3, n_keys: int | None = None, n_tensors: int = 1) -> bytes:
    parts = [struct.pack("<4sIQQ", b"GGUF", version, n_tensors, len(values) if n_keys is None else n_keys)]
    for key, value in values.items():
        kind, data = item(value)
        parts += [text(key), struct.pack("<I", kind), data]
    return b"".join(parts)


def write_split(folder: Path, n_parts: int = 3) -> list[Path]:
    """A model in so many files, named as llama.cpp wants them. Their headers are all there is."""
    paths = [folder / f"split-{part:05}-of-{n_parts:05}.gguf" for part in range(1, n_parts + 1)]
    for number, path in enumerate(paths):
        write(path, (LLAMA if number == 0 else {}) | {"split.no": number, "split.count": n_parts})
    return paths


def write(path: Path, values: dict[str, Any] | None = None, *, file_bytes: int = 0) -> Path:
    """A file of at least so many bytes; those behind the header take no room on the disk."""
    with path.open("wb") as file:
        file.write(header(LLAMA if values is None else values))
        if file.tell() < file_bytes:
            file.truncate(file_bytes)
    return path
