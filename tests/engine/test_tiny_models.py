"""The small models with random weights: the real engine loads each, and what they promise to other tests holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny_models
from tests.engine.conftest import LAZY_DOG, run, started, submit

TinyModel = Callable[[tiny_models.Kind], Path]


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny_models.KINDS)
async def test_the_real_engine_answers_a_prompt_of_a_thousand_tokens(
    kind: tiny_models.Kind, tiny_model: TinyModel
) -> None:
    async with started(None, path=str(tiny_model(kind)), n_ctx=4096, n_chunk=256) as engine:
        reply = await run(engine, submit(LAZY_DOG * 75, max_tokens=40))
        other = await run(engine, submit("List three fruits. " * 100 + LAZY_DOG * 40, max_tokens=40))
    assert reply.advances[-1].prompt_tokens > 1000
    assert (len(reply.tokens), reply.finish) == (40, "length")
    assert other.tokens != reply.tokens


@pytest.mark.slow
def test_a_model_is_the_same_to_the_byte_each_time_and_has_as_many_layers_as_asked(tmp_path: Path) -> None:
    paths = [tiny_models.write(tmp_path / name, "llama", n_layers=3) for name in ("one", "other")]
    one, other = (hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    assert one == other
    assert b"blk.2.attn_q.weight" in paths[0].read_bytes()
    assert b"blk.3.attn_q.weight" not in paths[0].read_bytes()
