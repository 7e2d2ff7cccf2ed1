"""Reads the header of a GGUF file, and computes how much memory a sequence of its model takes.

Owns the parser of the header's key-value part and its limits, and the reasons why a file is no model that can be
loaded. The worker calls `read` before it lets an engine open the file, and `llamalith config check` calls it too.
Trusts no length in the file and runs no native code. Knows nothing of memory budgets.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from llamalith_app import files
from llamalith_app.errors import LlamalithError

MAX_HEADER_BYTES = 64 * 1024 * 1024
"""A vocabulary of 260,000 tokens with its merges takes 15 MB of it."""
MAX_KEYS = 10_000
MAX_KEY_BYTES = 65_535
MAX_ITEMS = 4_000_000
"""Limit for the texts in one list."""
MAX_LAYERS = 4096
KEPT_BYTES = 256
"""Longer texts are skipped."""
VERSIONS = (2, 3)
KV_BYTES = 2
"""Bytes of one number in the KV cache: f16 or bf16."""
STATE_BYTES = 4
"""Bytes of one number in a recurrent state: f32."""
CELLS = 256
"""llama.cpp rounds the context of a sequence up to a multiple of this."""
MAX_PARTS = 2**16 - 1
"""Limit for the files of a split model: the key has 16 bits."""
PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
OTHER_TYPES = {
    "adapter": "an adapter (LoRA) of one",
    "imatrix": "an importance matrix of one",
    "mmproj": "the part of one that reads pictures or sound (mmproj)",
}
"""Values of `general.type` for files that are no models -> what they are instead."""

SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
TEXT, LIST = 8, 9

Value = int | float | bool | str | list[int | float | bool]


class BadGguf(LlamalithError):
    """The file is no GGUF, or its header is damaged. The message is a sentence that names the file."""


class Header(NamedTuple):
    """The properties of a model that decide how much memory it takes."""

    architecture: str
    n_layers: int
    n_ctx_train: int
    """Tokens that the model was trained for; 0: the header does not say."""
    kv_bytes: int
    """Bytes of the KV cache for each token; 0 for a model whose layers are all recurrent."""
    state_bytes: int
    """Bytes of the recurrent state for each sequence."""
    file_bytes: int
    """Size of the file, or of all files if the model is split."""
    flaw: str = ""
    """Why llama.cpp will not load the model although its header is fine: a sentence that names the file. Empty: no
    reason is known."""

    def sequence_bytes(self, n_ctx: int) -> int:
        """Bytes that a sequence of `n_ctx` tokens takes at most. A sliding window takes less, which is not counted."""
        n_tokens = min(n_ctx, self.n_ctx_train or n_ctx)
        return -(-n_tokens // CELLS) * CELLS * self.kv_bytes + self.state_bytes


def read(path: Path) -> Header:
    """Returns the header. Raises BadGguf, and OSError if the file cannot be read."""
    reader, n_tensors, values = _head(path)
    header = _header(values, reader, reader.size)
    return header._replace(flaw=_flaw(n_tensors, values, reader))


def _head(path: Path) -> tuple[_Reader, int, dict[str, Value]]:
    """The reader that has read the file, the number of tensors, and the values of the keys."""
    with files.open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        reader = _Reader(file, size, path)
        return reader, *_values(reader)


def _values(reader: _Reader) -> tuple[int, dict[str, Value]]:
    if reader.take(4) != b"GGUF":
        raise reader.bad("is no GGUF: it does not start with that word")
    version = int.from_bytes(reader.take(4), "little")
    if version not in VERSIONS:
        order = " in big-endian order" if version.to_bytes(4, "little")[3] in VERSIONS and not version % 2**24 else ""
        raise reader.bad(f"is a GGUF of version {version}{order}; {VERSIONS[0]} and {VERSIONS[-1]} can be read")
    n_tensors = reader.number()
    n_keys = reader.number()
    if n_keys > MAX_KEYS:
        raise reader.bad(f"says that its header has {n_keys} keys; at most {MAX_KEYS} are read")
    values: dict[str, Value] = {}
    for _ in range(n_keys):
        length = reader.number()
        if length > MAX_KEY_BYTES:
            raise reader.bad(f"has a key of {length} bytes; at most {MAX_KEY_BYTES} are allowed")
        key = reader.take(length).decode(errors="replace")
        value = reader.value()
        if value is not None:
            values[key] = value
    return n_tensors, values


class _Reader:
    """Reads the header step by step. Compares every length with the file's size and MAX_HEADER_BYTES before it uses
    it."""

    def __init__(self, file: IO[bytes], size: int, path: Path) -> None:
        self._file = file
        self.size = size
        self.path = path
        self._position = 0

    def bad(self, what: str) -> BadGguf:
        return BadGguf(f"The model file {self.path} {what}.")

    def take(self, n_bytes: int) -> bytes:
        self._advance(n_bytes)
        found = self._file.read(n_bytes)
        if len(found) < n_bytes:
            raise self.bad("became shorter while it was read")
        return found

    def skip(self, n_bytes: int) -> None:
        self._advance(n_bytes)
        self._file.seek(n_bytes, 1)

    def number(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def value(self) -> Value | None:
        """The value; None: it is too long to be of interest."""
        kind = self._kind()
        if kind == TEXT:
            return self._text()
        if kind == LIST:
            return self._list()
        return self._scalar(kind)

    def _advance(self, n_bytes: int) -> None:
        self._position += n_bytes
        if self._position > self.size:
            raise self.bad("is truncated or damaged: its header goes on beyond its end")
        if self._position > MAX_HEADER_BYTES:
            raise self.bad(f"has a header of more than {MAX_HEADER_BYTES // 1024**2} MiB; no more is read")

    def _kind(self) -> int:
        kind = int.from_bytes(self.take(4), "little")
        if kind not in SCALARS and kind not in (TEXT, LIST):
            raise self.bad(f"is damaged: its header has a value of the unknown type {kind}")
        return kind

    def _scalar(self, kind: int) -> int | float | bool:
        shape = SCALARS[kind]
        found: int | float | bool = shape.unpack(self.take(shape.size))[0]
        return found

    def _text(self) -> str | None:
        length = self.number()
        if length > KEPT_BYTES:
            self.skip(length)
            return None
        return self.take(length).decode(errors="replace")

    def _list(self) -> Value | None:
        """The numbers of a short list; the number of items of a long list or a list of texts."""
        kind, n_items = self._kind(), self.number()
        if kind == LIST:
            raise self.bad("is damaged: its header has a list of lists")
        if kind == TEXT:
            if n_items > MAX_ITEMS:
                raise self.bad(f"says that a list of its header has {n_items} texts; at most {MAX_ITEMS} are read")
            for _ in range(n_items):
                self.skip(self.number())
            return n_items
        if n_items > MAX_LAYERS:
            self.skip(n_items * SCALARS[kind].size)
            return n_items
        return [self._scalar(kind) for _ in range(n_items)]


def _header(values: Mapping[str, Value], reader: _Reader, size: int) -> Header:
    _check_is_a_model(values, reader)
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise reader.bad("does not say its architecture")

    def number(key: str, default: int | None = None) -> int:
        found = values.get(f"{architecture}.{key}", default)
        # If layers differ, some of these values are a list. Its largest number counts.
        if isinstance(found, list):
            found = max((item for item in found if isinstance(item, int)), default=None)
        if not isinstance(found, int) or found < 0:
            raise reader.bad(f"does not say its {key}" if found is None else f"has a {key} that is no number")
        return found

    n_layers = number("block_count")
    if n_layers > MAX_LAYERS:
        raise reader.bad(f"says that it has {n_layers} layers; at most {MAX_LAYERS} are believed")
    n_heads = number("attention.head_count", 0)
    width = number("embedding_length", 0) // n_heads if n_heads else 0
    k, v = number("attention.key_length", width), number("attention.value_length", width)
    heads = values.get(f"{architecture}.attention.head_count_kv", n_heads)
    if isinstance(heads, list):
        by_layer = [item if isinstance(item, int) and item > 0 else 0 for item in heads]
        n_kv_heads, n_recurrent = sum(by_layer), by_layer.count(0)
    else:
        n_kv_heads = n_layers * number("attention.head_count_kv", n_heads)
        n_recurrent = 0 if n_kv_heads else n_layers
    return Header(
        architecture=architecture,
        n_layers=n_layers,
        n_ctx_train=number("context_length", 0),
        kv_bytes=n_kv_heads * (k + v) * KV_BYTES,
        # Some models have attention and a state in every layer, and then `head_count_kv` is no list.
        state_bytes=(n_recurrent or n_layers) * _state_numbers(number) * STATE_BYTES,
        file_bytes=size + sum(part.stat().st_size for part in _other_parts(reader.path, values) if part.is_file()),
    )


def _state_numbers(number: Callable[[str, int], int]) -> int:
    """The numbers in the recurrent state of one layer of one sequence."""
    inner, n_state = number("ssm.inner_size", 0), number("ssm.state_size", 0)
    n_convolved = inner + 2 * number("ssm.group_count", 0) * n_state
    head, width = number("wkv.head_size", 0), number("embedding_length", 0)
    return inner * n_state + max(0, number("ssm.conv_kernel", 0) - 1) * n_convolved + (head + 2) * width * bool(head)


def _check_is_a_model(values: Mapping[str, Value], reader: _Reader) -> None:
    """Raises BadGguf for a file that is something else: not a model, or not the first file of a split one. Such a file
    may have no architecture or no layers."""
    kind, part, n_parts = values.get("general.type"), values.get("split.no"), _n_parts(values)
    if isinstance(kind, str) and kind in OTHER_TYPES:
        raise reader.bad(f"is no model but {OTHER_TYPES[kind]}")
    if n_parts > 1 and isinstance(part, int) and part > 0:
        first = PART.sub(f"-00001-of-{n_parts:05}.gguf", reader.path.name)
        if first == reader.path.name:
            first = f"…-00001-of-{n_parts:05}.gguf"
        raise reader.bad(f"is part {part + 1} of a model that is split into {n_parts} files: give the first, {first}")


def _flaw(n_tensors: int, values: Mapping[str, Value], reader: _Reader) -> str:
    """As `Header.flaw`. Reads the headers of the other files of a split model."""
    n_parts = _n_parts(values)
    if n_parts < 2:
        return "" if n_tensors else str(reader.bad("has no weights, at most a vocabulary"))
    if not reader.path.name.endswith(f"-00001-of-{n_parts:05}.gguf"):
        must = f"its name must end with -00001-of-{n_parts:05}.gguf"
        return str(reader.bad(f"is the first of the {n_parts} files of a model, and {must}"))
    for number, part in enumerate(_other_parts(reader.path, values), 2):
        split = f"is the first of the {n_parts} files of a model, and part {number}, {part.name},"
        try:
            _, _, found = _head(part)
        except BadGguf as error:
            return str(error)
        except OSError as error:
            return str(reader.bad(f"{split} cannot be read: {error.strerror}"))
        if found.get("split.no") != number - 1:
            return str(reader.bad(f"{split} is another part or none"))
    return ""


def _n_parts(values: Mapping[str, Value]) -> int:
    """The number of files of the model."""
    found = values.get("split.count")
    return found if isinstance(found, int) and 1 < found <= MAX_PARTS else 1


def _other_parts(path: Path, values: Mapping[str, Value]) -> Iterator[Path]:
    """The paths where llama.cpp looks for the other files. There are none if the name is not that of a first file."""
    n_parts = _n_parts(values)
    end = f"-00001-of-{n_parts:05}.gguf"
    if n_parts > 1 and path.name.endswith(end):
        for number in range(2, n_parts + 1):
            yield path.with_name(f"{path.name.removesuffix(end)}-{number:05}-of-{n_parts:05}.gguf")
