"""Files that are no model, or no whole one: a sentence each, and never a hang."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from pathlib import Path

import llama_cpp
import pytest
import structlog

from llamalith_app.engine import loader
from llamalith_app.engine.client.local import LocalEngine
from llamalith_app.engine.client.protocol import EngineDied, EngineLoadFailed
from llamalith_app.engine.messages import GpuOffload
from tests.engine.conftest import Script, bundled_model, load, run, started, submit
from tests.settle import eventually

pytestmark = pytest.mark.slow

WITHIN_S = 60


async def refused(path: Path | str, sha256: str | None = None) -> str:
    with pytest.raises(EngineLoadFailed) as failed:
        async with asyncio.timeout(WITHIN_S):
            await LocalEngine.start(load(path=str(path), sha256=sha256))
    assert "smollm2" in str(failed.value)
    assert str(path) in str(failed.value)
    return str(failed.value)


async def test_a_missing_file(tmp_path: Path) -> None:
    assert "No such file" in await refused(tmp_path / "missing.gguf")


async def test_a_directory(tmp_path: Path) -> None:
    assert "is not a file" in await refused(tmp_path)


async def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "is not a file" in await refused(tmp_path / "pipe.gguf")


async def test_a_file_that_cannot_be_read() -> None:
    # By its looks a regular file, and not to be read by any user.
    assert "cannot be read" in await refused("/proc/self/mem")


@pytest.mark.parametrize("content", [b"", b"GG", b"<html>not found</html>"])
async def test_what_is_no_gguf(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    assert "is not a GGUF file" in await refused(tmp_path / "model.gguf")


async def test_another_file_than_the_pinned_one() -> None:
    assert "SHA-256" in await refused(bundled_model(), sha256="0" * 64)


async def test_the_pinned_file_is_loaded() -> None:
    digest = hashlib.sha256(bundled_model().read_bytes()).hexdigest()
    async with started(None, sha256=digest) as engine:
        assert (await run(engine, submit("Hi", max_tokens=2))).tokens


@pytest.mark.parametrize("n_bytes", [4, 24, 1000, 100_000, 1_900_000, 50_000_000, -1])
async def test_a_truncated_file_is_refused_by_name(tmp_path: Path, n_bytes: int) -> None:
    (tmp_path / "model.gguf").write_bytes(bundled_model().read_bytes()[:n_bytes])
    await refused(tmp_path / "model.gguf")


@pytest.mark.parametrize("seed", range(12))
async def test_a_damaged_file_is_read_or_refused_by_a_type_and_never_hangs(tmp_path: Path, seed: int) -> None:
    data = bytearray(bundled_model().read_bytes())
    for number in range(50):
        digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
        data[int.from_bytes(digest[:4], "big") % 200_000] ^= 0xFF
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    outcome = "read"
    try:
        async with asyncio.timeout(WITHIN_S), started(None, path=str(path)) as engine:
            await run(engine, submit("Hi", max_tokens=2))
    except (EngineLoadFailed, EngineDied) as error:
        outcome = str(error)
    assert outcome == "read" or str(path) in outcome or outcome.startswith("The engine ")


async def test_a_crash_while_loading_is_reported_at_once(script: Script) -> None:
    with pytest.raises(EngineDied, match="SIGABRT"):
        await LocalEngine.start(load(), script({"model": "smollm2", "load_signal": 6}))


async def test_a_load_that_is_given_up_leaves_no_child(tmp_path: Path) -> None:
    program = tmp_path / "never_ready.py"
    program.write_text(
        "import os, pathlib, socket, sys\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "s = socket.socket(fileno=int(sys.argv[-1]))\n"
        "while s.recv(4096): pass\n"
    )
    loading = asyncio.create_task(LocalEngine.start(load(), [sys.executable, str(program)]))

    async def pid() -> str:
        return (tmp_path / "pid").read_text() if (tmp_path / "pid").exists() else ""

    child = int(await eventually(pid))
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


async def test_layers_that_no_gpu_can_take_are_a_warning_and_the_model_runs_all_the_same() -> None:
    if llama_cpp.llama_supports_gpu_offload():
        pytest.skip("this build of llama.cpp finds a GPU")
    with structlog.testing.capture_logs() as lines:
        async with started(None, n_gpu_layers=-1) as engine:
            assert (await run(engine, submit("Hi", max_tokens=2))).tokens
    (line,) = [line for line in lines if line["event"].startswith("n_gpu_layers is set, but llama.cpp finds no GPU")]
    assert (line["log_level"], line["model"], line["n_gpu_layers"]) == ("warning", "smollm2", -1)


async def test_a_model_for_the_cpu_says_nothing_of_a_gpu() -> None:
    with structlog.testing.capture_logs() as lines:
        async with started(None):
            pass
    assert [line for line in lines if "GPU" in line["event"]] == []


async def test_what_a_gpu_holds_is_logged(script: Script) -> None:
    with structlog.testing.capture_logs() as lines:
        async with started(script({"model": "smollm2", "gpu": [25, 31]}), n_gpu_layers=25):
            pass
    (line,) = [line for line in lines if "GPU" in line["event"]]
    assert line == {
        "event": "layers offloaded to the GPU",
        "log_level": "info",
        "model": "smollm2",
        "n_layers": 25,
        "of": 31,
    }


def test_what_was_offloaded_is_read_from_the_line_that_llama_cpp_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_offloaded", type(loader._offloaded)(maxlen=1))
    assert loader.gpu_offload(0) is None
    loader._log_problems(2, b"load_tensors: offloading output layer to GPU\n", None)
    loader._log_problems(2, b"load_tensors: offloaded 0/31 layers to GPU\n", None)
    assert loader.gpu_offload(0) is None
    loader._log_problems(2, b"load_tensors: offloaded 31/31 layers to GPU\n", None)
    assert loader.gpu_offload(-1) == GpuOffload(requested=-1, n_layers=31, n_layers_total=31)
