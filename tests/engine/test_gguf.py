"""Headers of model files: what is read of them, and the messages about damaged and hostile ones."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamalith_app.engine import gguf
from llamalith_app.engine.gguf import BadGguf
from tests.gguf import LLAMA, header, text, write, write_split


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_header_gives_the_cache_that_a_token_takes(tmp_path: Path) -> None:
    found = gguf.read(write(tmp_path / "m.gguf", file_bytes=10_000))
    # 2 layers of 2 heads, keys and values of 16 numbers, 2 bytes each
    assert found == gguf.Header("llama", 2, 4096, 2 * 2 * (16 + 16) * 2, 0, 10_000)
    assert found.sequence_bytes(1000) == 1024 * 256
    assert found.sequence_bytes(1_000_000) == 4096 * 256


def test_layers_that_differ_are_added_up_and_those_without_heads_hold_a_state(tmp_path: Path) -> None:
    values = LLAMA | {
        "llama.attention.head_count_kv": [2, 0],
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 4,
        "llama.ssm.inner_size": 100,
        "llama.ssm.state_size": 10,
        "llama.ssm.conv_kernel": 4,
    }
    found = gguf.read(write(tmp_path / "m.gguf", values))
    assert found.kv_bytes == 2 * (8 + 4) * 2
    assert found.state_bytes == (100 * 10 + 3 * 100) * 4


def test_a_model_that_is_recurrent_throughout_has_no_cache(tmp_path: Path) -> None:
    values = {
        "general.architecture": "mamba",
        "mamba.block_count": 3,
        "mamba.embedding_length": 64,
        "mamba.attention.head_count": 0,
        "mamba.ssm.inner_size": 128,
        "mamba.ssm.state_size": 16,
        "mamba.ssm.conv_kernel": 4,
    }
    found = gguf.read(write(tmp_path / "m.gguf", values))
    assert (found.kv_bytes, found.state_bytes) == (0, 3 * (128 * 16 + 3 * 128) * 4)
    assert found.sequence_bytes(4096) == found.state_bytes


def test_a_split_model_counts_all_its_parts(tmp_path: Path) -> None:
    first = write(tmp_path / "m-00001-of-00002.gguf", LLAMA | {"split.no": 0, "split.count": 2}, file_bytes=5000)
    write(tmp_path / "m-00002-of-00002.gguf", {"split.no": 1, "split.count": 2}, file_bytes=7000)
    found = gguf.read(first)
    assert (found.file_bytes, found.flaw) == (12_000, "")


def test_a_part_that_is_not_the_first_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    for name, first in (("m-00002-of-00003.gguf", "m-00001-of-00003.gguf"), ("other.gguf", "…-00001-of-00003.gguf")):
        path = write(tmp_path / name, {"split.no": 1, "split.count": 3})
        with pytest.raises(BadGguf) as error:
            gguf.read(path)
        assert str(error.value) == (
            f"The model file {path} is part 2 of a model that is split into 3 files: give the first, {first}."
        )


def test_what_is_wrong_with_the_parts_of_a_split_model_is_reported_by_the_first_one(tmp_path: Path) -> None:
    first, second, third = write_split(tmp_path)
    assert gguf.read(first).flaw == ""
    renamed = tmp_path / "renamed.gguf"
    renamed.hardlink_to(first)
    start = f"The model file {renamed} is the first of the 3 files of a model"
    assert gguf.read(renamed).flaw == f"{start}, and its name must end with -00001-of-00003.gguf."
    start = f"The model file {first} is the first of the 3 files of a model, and part 2, {second.name},"
    second.rename(tmp_path / "second")
    assert gguf.read(first).flaw == f"{start} cannot be read: No such file or directory."
    second.hardlink_to(third)
    assert gguf.read(first).flaw == f"{start} is another part or none."
    second.unlink()
    second.write_bytes(b"GGUF")
    assert (
        gguf.read(first).flaw == f"The model file {second} is truncated or damaged: its header goes on beyond its end."
    )


def test_a_file_without_weights_is_reported(tmp_path: Path) -> None:
    path = written(tmp_path / "vocabulary.gguf", header(LLAMA, n_tensors=0))
    assert gguf.read(path).flaw == f"The model file {path} has no weights, at most a vocabulary."


def test_a_first_part_may_hold_the_keys_alone(tmp_path: Path) -> None:
    first = tmp_path / "m-00001-of-00002.gguf"
    first.write_bytes(header(LLAMA | {"split.no": 0, "split.count": 2}, n_tensors=0))
    write(tmp_path / "m-00002-of-00002.gguf", {"split.no": 1, "split.count": 2})
    assert gguf.read(first).flaw == ""


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is truncated or damaged"),
        (b"PK\3\4" * 100, "is no GGUF"),
        (header(LLAMA, version=1), "version 1;"),
        (header(LLAMA, version=4), "version 4;"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 1), "in big-endian order"),
        (header(LLAMA, n_keys=2**60), "has 1152921504606846976 keys"),
        (header(LLAMA)[:-1], "is truncated or damaged"),
        (header({})[:16] + struct.pack("<QQ", 1, 2**40), "key of 1099511627776 bytes"),
        (header({}, n_keys=1) + text("k") + struct.pack("<IQ", 8, 2**63), "goes on beyond its end"),
        (header({}, n_keys=1) + text("k") + struct.pack("<IIQ", 9, 4, 2**62), "goes on beyond its end"),
        (header({}, n_keys=1) + text("k") + struct.pack("<IIQ", 9, 8, 2**62), "has 4611686018427387904 texts"),
        (header({}, n_keys=1) + text("k") + struct.pack("<IIQ", 9, 9, 1), "list of lists"),
        (header({}, n_keys=1) + text("k") + struct.pack("<I", 77), "unknown type 77"),
        (header({"a": 1}), "does not say its architecture"),
        (header({"general.architecture": 1}), "does not say its architecture"),
        (header({"general.type": "imatrix"}), "is no model but an importance matrix of one"),
        (header({"general.type": "mmproj", "general.architecture": "clip"}), "is no model but the part of one that"),
        (header({"general.type": "adapter", "general.architecture": "llama"}), "is no model but an adapter"),
        (header({"general.architecture": "x"}), "does not say its block_count"),
        (header(LLAMA | {"llama.block_count": "two"}), "has a block_count that is no number"),
        (header(LLAMA | {"llama.block_count": 2**32 - 1}), "says that it has 4294967295 layers"),
    ],
)
def test_a_file_that_cannot_be_a_model_is_refused_by_its_name(tmp_path: Path, data: bytes, reason: str) -> None:
    path = written(tmp_path / "bad.gguf", data)
    with pytest.raises(BadGguf, match=reason) as error:
        gguf.read(path)
    assert str(error.value).startswith(f"The model file {path} ")


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="Not a regular file|Is a directory"):
            gguf.read(path)


def test_no_more_than_a_bounded_part_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf", header({}, n_keys=1) + text("k") + struct.pack("<IQ", 8, 2**30))
    with path.open("r+b") as file:
        file.truncate(2**31)
    with pytest.raises(BadGguf, match="a header of more than 64 MiB"):
        gguf.read(path)


@given(at=st.integers(0, len(header(LLAMA)) - 1), byte=st.integers(0, 255), cut=st.booleans())
def test_a_changed_header_is_read_or_refused_and_never_anything_else(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, cut: bool
) -> None:
    data = bytearray(header(LLAMA))
    data[at] = byte
    path = written(tmp_path_factory.getbasetemp() / "mutant.gguf", bytes(data[:at] if cut else data))
    try:
        found = gguf.read(path)
    except BadGguf:
        return
    assert not cut
    assert found.kv_bytes >= 0
    assert found.sequence_bytes(4096) >= 0


@given(data=st.binary(max_size=200))
def test_what_stands_behind_the_magic_word_breaks_nothing(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = written(tmp_path_factory.getbasetemp() / "noise.gguf", struct.pack("<4sIQQ", b"GGUF", 3, 0, 3) + data)
    with pytest.raises(BadGguf):
        gguf.read(path)
