"""A worker with the real engine and tiny models: what a bad file or a killed child costs, and what it does not."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llamalith_app.contracts.parameters import JsonSchema
from llamalith_app.engine.client.local import LocalEngine
from llamalith_app.engine.messages import Loading, Step
from llamalith_app.jobs.worker.process import Worker
from llamalith_app.settings.config import Config, ModelConfig
from llamalith_app.settings.declaration import ModelSettings
from llamalith_app.store.database import Database
from tests import tiny_models
from tests.worker.conftest import Submit, attempts, ended

TinyModel = Callable[[tiny_models.Kind], Path]

SETTINGS = ModelSettings(n_ctx=4096, n_chunk=32, max_tokens=300, temperature=0.0)
LONG = "The quick brown fox jumps over the lazy dog. " * 60
WITHIN_S = 120
KWARGS = {"chat_template_kwargs": {"enable_thinking": False}}
pytestmark = pytest.mark.slow


@pytest.fixture
def models(config: Config, tiny_model: TinyModel, tmp_path: Path) -> Config:
    """`m` answers, `n` does too and is of another kind, `damaged` cannot be loaded, `looping` renders nothing."""
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny_model("llama").read_bytes()[:100_000])
    looping = tiny_models.write(tmp_path / "looping.gguf", "llama", template=tiny_models.LOOPING_TEMPLATE)
    paths = {"m": tiny_model("llama"), "n": tiny_model("recurrent"), "damaged": damaged, "looping": looping}
    return msgspec.structs.replace(
        config, models=tuple(ModelConfig(name=name, path=path, settings=SETTINGS) for name, path in paths.items())
    )


@asynccontextmanager
async def working(config: Config) -> AsyncIterator[Worker]:
    worker = Worker(config)
    await worker.start()
    try:
        yield worker
    finally:
        await worker.drain(5)


async def test_a_damaged_model_and_one_whose_template_loops_end_as_typed_errors_and_the_good_one_goes_on(
    models: Config, submit: Submit, database: Database
) -> None:
    async with asyncio.timeout(WITHIN_S), working(models):
        asked = [
            (model, await submit("Hi", None, model=model, max_attempts=1))
            for model in ("damaged", "m", "looping", "n", "m")
        ]
        jobs = [(model, await ended(database, job_id, within_s=WITHIN_S)) for model, job_id in asked]
    seen = {(model, job.status, job.error.kind if job.error else None) for model, job in jobs}
    assert seen == {
        ("m", "done", None),
        ("n", "done", None),
        ("damaged", "error", "model_unavailable"),
        ("looping", "error", "template"),
    }
    for model, job in jobs:
        reason = job.error.reason if job.error else ""
        assert ("damaged.gguf" in reason) == (model == "damaged")
        assert ("computes for more than" in reason) == (model == "looping")


async def test_a_model_that_never_stops_thinking_is_stopped_and_its_reply_fits_the_schema(
    config: Config, submit: Submit, database: Database, tmp_path: Path
) -> None:
    template = "{{ messages[-1].content }}<think>{% if enable_thinking is false %}</think>{% endif %}"
    path = tiny_models.write(tmp_path / "m.gguf", "llama", template=template, control=("<think>", "</think>"))
    settings = msgspec.structs.replace(SETTINGS, thinking_budget=9, max_tokens=40)
    model = ModelConfig(name="m", path=path, settings=settings)
    wanted = JsonSchema(schema={"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]})
    async with asyncio.timeout(WITHIN_S), working(msgspec.structs.replace(config, models=(model,))):
        asked = [
            await submit("Hi", None, model="m", response_format=wanted, **more)
            for more in ({}, {"reasoning_effort": 3}, {"reasoning_effort": "none"}, {"reasoning_effort": 0}, KWARGS)
        ]
        jobs = [await ended(database, job_id, within_s=WITHIN_S) for job_id in asked]
    assert [msgspec.json.decode(job.result or "")["a"] in (1, 2) for job in jobs] == [True] * 5
    usual, short, *without = jobs
    assert len(usual.thinking or "") > len(short.thinking or "") > 0
    assert [job.thinking for job in without] == [None] * 3


def in_load(message: object) -> bool:
    return isinstance(message, Loading)


def in_prefill(message: object) -> bool:
    return isinstance(message, Step) and any(0 < one.prompt_done < one.prompt_tokens for one in message.sequences)


def in_decode(message: object) -> bool:
    return isinstance(message, Step) and any(one.tokens and one.finish is None for one in message.sequences)


async def test_an_engine_leaves_its_end_to_its_worker_when_a_supervisor_signals_everybody(
    models: Config, submit: Submit, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    handle = LocalEngine._handle

    def handle_and_signal(engine: LocalEngine, message: Any) -> None:
        if not seen and in_decode(message):
            seen.append(engine.pid)
            os.kill(engine.pid, signal.SIGTERM)
            os.kill(engine.pid, signal.SIGINT)
        handle(engine, message)

    monkeypatch.setattr(LocalEngine, "_handle", handle_and_signal)
    async with asyncio.timeout(WITHIN_S), working(models):
        job = await ended(database, await submit("Hi", "d", model="n"), within_s=WITHIN_S)
    assert (len(seen), job.status, job.attempt) == (1, "done", 1)


@pytest.mark.parametrize("moment", [in_load, in_prefill, in_decode])
async def test_a_job_whose_engine_is_killed_runs_again_and_the_other_model_goes_on(
    moment: Callable[[object], bool],
    models: Config,
    submit: Submit,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed: list[str] = []
    handle = LocalEngine._handle

    def handle_and_kill(engine: LocalEngine, message: Any) -> None:
        if engine.model == "m" and not killed and moment(message):
            killed.append(engine.model)
            os.kill(engine.pid, signal.SIGKILL)
        handle(engine, message)

    monkeypatch.setattr(LocalEngine, "_handle", handle_and_kill)
    async with asyncio.timeout(WITHIN_S), working(models):
        hit, other = await submit(LONG, "c", model="m"), await submit("Hi", "d", model="n")
        job = await ended(database, hit, within_s=WITHIN_S)
        beside = await ended(database, other, within_s=WITHIN_S)
    assert killed == ["m"]
    assert (job.status, job.attempt, job.finish_reason) == ("done", 2, "length")
    first, second = await attempts(database, hit)
    assert first[:2] == (1, "failed")
    assert "SIGKILL" in first[2]
    assert second == (2, "done", None)
    assert (beside.status, beside.attempt) == ("done", 1)
