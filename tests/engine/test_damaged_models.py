"""Model files that are damaged or mean harm: each answers or ends in a typed error, none hangs, the next one loads."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from llamalith_app.engine.client.local import REAL_ENGINE, LocalEngine
from llamalith_app.engine.client.protocol import EngineDied, EngineLoadFailed, EngineRefused
from tests import tiny_models
from tests.engine.conftest import load, run, started, submit

pytestmark = pytest.mark.slow


TinyModel = Callable[[tiny_models.Kind], Path]

WITHIN_S = 60
MEMORY_KB = 4_000_000
BOUND = ("sh", "-c", f'ulimit -v {MEMORY_KB}; exec "$0" "$@"', *REAL_ENGINE)
"""What a changed byte asks for is not to be taken from the machine that the tests run on."""


async def outcome(path: Path) -> str:
    """How the engine takes the file: `answers`, or the kind of its error."""
    try:
        async with asyncio.timeout(WITHIN_S):
            engine = await LocalEngine.start(load(path=str(path)), BOUND)
    except (EngineLoadFailed, EngineDied) as error:
        return type(error).__name__
    try:
        async with asyncio.timeout(WITHIN_S):
            await run(engine, submit("Hi", max_tokens=4))
    except (EngineRefused, EngineDied) as error:
        return type(error).__name__
    finally:
        async with asyncio.timeout(WITHIN_S):
            await engine.stop()
    return "answers"


async def is_well(path: Path) -> None:
    assert await outcome(path) == "answers"


def header_end(whole: bytes) -> int:
    """About where the list of tensors ends: behind it stand megabytes of weights."""
    return whole.rindex(b".weight") + 40


def damaged(whole: bytes, seed: int) -> bytes:
    """With one to three bytes of the header changed: of sizes, where the parser sees nothing wrong; of the list of
    tensors; or of any part of it."""
    dist = random.Random(seed)
    tensors = range(whole.index(b"token_embd.weight") - 8, header_end(whole))
    sizes = [
        match.end() + 4 + offset
        for match in re.finditer(rb"(llama|gemma3|mamba|jamba)\.[a-z_.]+", whole[: whole.index(b"tokenizer.ggml")])
        for offset in range(4)
    ]
    places = dist.choice([sizes, sizes, tensors, range(4, header_end(whole))])
    data = bytearray(whole)
    for place in dist.sample(places, dist.choice([1, 1, 3])):
        data[place] ^= dist.randrange(1, 256)
    return bytes(data)


@pytest.mark.parametrize("first", range(0, 42, 7))
async def test_changed_bytes_in_the_header_end_in_a_typed_error_or_an_answer(
    first: int, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = tmp_path / "damaged.gguf"
    for seed in range(first, first + 7):
        whole = tiny_model(tiny_models.KINDS[seed % len(tiny_models.KINDS)]).read_bytes()
        path.write_bytes(damaged(whole, seed))
        assert path.read_bytes() != whole
        await outcome(path)
    await is_well(tiny_model("llama"))


@pytest.mark.parametrize("part", ["header", "weights"])
async def test_a_file_cut_at_any_of_ten_places_is_refused(part: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    whole = tiny_model("sliding").read_bytes()
    first, last = (0, header_end(whole)) if part == "header" else (header_end(whole), len(whole))
    path = tmp_path / "cut.gguf"
    for place in range(10):
        path.write_bytes(whole[: first + (last - first) * place // 10])
        assert await outcome(path) in ("EngineLoadFailed", "EngineDied")
    await is_well(tiny_model("sliding"))


def patched(whole: bytes, old: bytes, new: bytes) -> bytes:
    assert len(old) == len(new)
    assert whole.count(old) >= 1
    return whole.replace(old, new)


def with_length(whole: bytes, key: bytes, length: int) -> bytes:
    """The array or string of that key says this length; what it holds stays as it is."""
    at = whole.index(key) + len(key)
    value_type = int.from_bytes(whole[at : at + 4], "little")
    at += 8 if value_type == 9 else 4  # an array says the type of its items first
    return whole[:at] + length.to_bytes(8, "little") + whole[at + 8 :]


def with_number(whole: bytes, key: bytes, number: int) -> bytes:
    at = whole.index(key) + len(key) + 4
    return whole[:at] + number.to_bytes(4, "little") + whole[at + 4 :]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda whole: patched(whole, b"llama", b"lhama"), id="an unknown architecture"),
        pytest.param(lambda whole: whole[:8] + b"\xff" * 16 + whole[24:], id="absurd counts of tensors and settings"),
        pytest.param(lambda whole: with_length(whole, b"tokenizer.ggml.tokens", 2**63), id="an absurd array"),
        pytest.param(lambda whole: with_length(whole, b"tokenizer.chat_template", 2**40), id="an absurd string"),
        pytest.param(lambda whole: with_number(whole, b"llama.block_count", 2**31), id="an absurd number of layers"),
        pytest.param(lambda whole: with_number(whole, b"llama.embedding_length", 0), id="no embedding"),
        pytest.param(lambda whole: with_number(whole, b"llama.attention.head_count", 0), id="no heads"),
        pytest.param(lambda whole: whole[:4] + bytes(len(whole) - 4), id="zeros"),
        pytest.param(lambda whole: whole[:4] + b"\x63\0\0\0" + whole[8:], id="a version to come"),
    ],
)
async def test_a_header_that_cannot_be_true_is_refused(
    damage: Callable[[bytes], bytes], tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(tiny_model("llama").read_bytes()))
    assert await outcome(path) in ("EngineLoadFailed", "EngineDied", "EngineRefused")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Only poems, please') }}", "Only poems, please"),
        ("{% for message in messages %}", "cannot be compiled: .*endfor"),
        (tiny_models.LOOPING_TEMPLATE, "computes for more than"),
        ("{{ 'a' * 9999999999 }}", "memory"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ (''|attr('__class__')).__mro__ }}", "unsafe|undefined"),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe|undefined"),
    ],
)
async def test_a_template_that_means_harm_refuses_every_conversation(
    template: str, reason: str, tmp_path: Path
) -> None:
    path = tiny_models.write(tmp_path / "model.gguf", "llama", template=template)
    async with asyncio.timeout(WITHIN_S), started(None, path=str(path)) as engine:
        with pytest.raises(EngineRefused, match=reason) as refused:
            await run(engine, submit("Hi"))
        assert refused.value.kind == "template"
        assert not engine.died.is_set()


async def test_a_conversation_that_makes_the_template_loop_leaves_the_others_alone(tmp_path: Path) -> None:
    path = tiny_models.write(tmp_path / "model.gguf", "llama", template=tiny_models.template_that_loops_on("loop"))
    async with asyncio.timeout(WITHIN_S), started(None, path=str(path), n_slots=2, n_ctx=8192) as engine:
        endless = submit("count", max_tokens=100_000)
        steps = engine.run(endless)
        await anext(steps)
        with pytest.raises(EngineRefused, match="computes for more than"):
            await run(engine, submit("loop"))
        assert (await run(engine, submit("Hi", max_tokens=4))).tokens
        assert (await anext(steps)).finish is None
        engine.cancel(endless.sequence_id)
        assert [step.finish async for step in steps][-1] == "cancelled"


def template_process(engine: LocalEngine) -> int:
    (pid,) = subprocess.run(["pgrep", "-P", str(engine.pid)], capture_output=True, text=True, check=True).stdout.split()
    return int(pid)


async def test_a_template_process_that_hangs_is_replaced_and_holds_up_no_other_job(tiny_model: TinyModel) -> None:
    async with asyncio.timeout(WITHIN_S), started(None, path=str(tiny_model("llama")), n_slots=2) as engine:
        await run(engine, submit("Hi", max_tokens=1))
        os.kill(template_process(engine), signal.SIGSTOP)
        ended: list[str] = []

        async def ask(name: str) -> None:
            assert (await run(engine, submit(name, max_tokens=4))).finish == "length"
            ended.append(name)

        first = asyncio.create_task(ask("first"))
        await asyncio.sleep(0)
        await asyncio.gather(first, ask("second"))
        assert ended == ["second", "first"]
        assert not engine.died.is_set()


async def test_a_template_process_that_is_killed_costs_no_attempt(tmp_path: Path) -> None:
    template = tiny_models.template_that_loops_on("slow").replace("99999", "1500")
    path = tiny_models.write(tmp_path / "model.gguf", "llama", template=template)
    async with asyncio.timeout(WITHIN_S), started(None, path=str(path)) as engine:
        await run(engine, submit("Hi", max_tokens=1))
        pid = template_process(engine)
        asked = asyncio.create_task(run(engine, submit("slow", max_tokens=4)))
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        assert (await asked).finish == "length"


@pytest.mark.parametrize("pre", ["gpt-4o", "deepseek-llm", "bloom"])
async def test_a_text_that_is_one_long_run_ends_no_engine(pre: str, tmp_path: Path) -> None:
    path = tiny_models.write(tmp_path / "model.gguf", "llama", pre=pre)
    async with asyncio.timeout(WITHIN_S), started(None, path=str(path)) as engine:
        for letter in ("a", " ", "-", "春"):
            with pytest.raises(EngineRefused) as refused:
                await run(engine, submit(f"x{letter * 300_000}x"))
            assert refused.value.kind == "context_overflow"
        assert not engine.died.is_set()


async def test_a_model_that_needs_more_memory_than_there_is_says_so_and_loads_when_it_asks_for_less(
    tmp_path: Path,
) -> None:
    # 8192 tokens in each of 255 slots are 8.6 GB of keys and values here; the process may have 4.
    path = tiny_models.write(tmp_path / "deep.gguf", "llama", n_layers=32)
    async with asyncio.timeout(WITHIN_S):
        with pytest.raises(EngineLoadFailed, match="not enough memory.*255 slots of 8192 tokens"):
            await LocalEngine.start(load(path=str(path), n_ctx=8192, n_slots=255), BOUND)
    await is_well(path)


async def why_not_loaded(path: Path) -> str:
    with pytest.raises(EngineLoadFailed) as failed:
        await LocalEngine.start(load(path=str(path)))
    reason = str(failed.value)
    assert str(path) in reason
    assert "\n" not in reason
    assert len(reason) < 400 + len(str(path))
    assert reason.isprintable()
    return reason


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda whole: patched(whole, b"llama", b"lhama"), "unknown model architecture: 'lhama'"),
        (lambda whole: patched(whole, b"blk.1.attn_k.", b"blk.1.\n\x01tn_k."), "blk.1.attn_k.weight' not found"),
        (lambda whole: patched(whole, b"llama.block_count", b"llama.block_c\n\x1b[2"), "llama.block_count"),
        (lambda whole: whole[: len(whole) // 2], "not within the file bounds"),
        (lambda whole: whole[:1000], "failed to read key-value pairs"),
        (lambda whole: with_number(whole, b"tokenizer.ggml.pre", 2**31), ""),
        (lambda whole: patched(whole, b"smollm", b"smallm"), "unknown pre-tokenizer type: 'smallm'"),
        (lambda whole: patched(whole, b"blk.0.ffn_up.", b"blk.0\x1b[2J\xff\n.."), ""),
    ],
)
async def test_why_a_file_cannot_be_loaded_is_reported_in_llama_cpps_words(
    damage: Callable[[bytes], bytes], reason: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(tiny_model("llama").read_bytes()))
    assert reason in await why_not_loaded(path)


async def test_a_model_of_several_files_says_which_of_them_is_wrong(tmp_path: Path) -> None:
    first, second, third = tiny_models.write_split(tmp_path)
    await is_well(first)
    assert "must be loaded with the first split" in await why_not_loaded(second)
    renamed = tmp_path / "renamed.gguf"
    renamed.hardlink_to(first)
    assert "invalid split file name" in await why_not_loaded(renamed)
    second.unlink()
    assert f"failed to open GGUF file '{second}'" in await why_not_loaded(first)
    second.hardlink_to(third)
    assert f"invalid split file idx: 2 (file: {second}), expected 1" in await why_not_loaded(first)


async def test_a_vocabulary_alone_is_reported_as_one(tmp_path: Path) -> None:
    path = tiny_models.write_vocabulary(tmp_path / "vocabulary.gguf")
    assert "a vocabulary and no weights" in await why_not_loaded(path)


@pytest.mark.parametrize("architecture", ["bert", "t5encoder"])
async def test_a_model_that_writes_no_text_says_so(architecture: Literal["bert", "t5encoder"], tmp_path: Path) -> None:
    path = tiny_models.write_encoder(tmp_path / "encoder.gguf", architecture)
    with pytest.raises(EngineLoadFailed, match=r"encoder.gguf.*reads text and writes none"):
        await LocalEngine.start(load(path=str(path)))
