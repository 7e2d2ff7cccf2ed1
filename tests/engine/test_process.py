"""The child and its parent part: how each notices that the other is gone or talks nonsense."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from llamalith_app.engine import frames
from llamalith_app.engine.client.local import REAL_ENGINE, LocalEngine, LocalTimings
from llamalith_app.engine.client.protocol import EngineDied, EngineRefused
from llamalith_app.engine.messages import Advance, Cancel, Loading, Step
from tests.engine.conftest import LAZY_DOG, Script, load, run, started, submit
from tests.settle import eventually

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

WITHIN_S = 20
PARENT = """
import asyncio, sys
from pathlib import Path
from llamalith_app import logs
from llamalith_app.settings.config import Config
from llamalith_app.engine.client.local import LocalEngine
from tests.engine.conftest import load, run, submit

async def main(prompt, *argv):
    engine = await LocalEngine.start(load(n_ctx=8192, n_chunk=2000), argv or None)
    print(engine.pid, flush=True)
    if prompt:
        await run(engine, submit(prompt))
    await asyncio.Event().wait()

logs.start("parent", Config(data_dir=Path("unused"), log_format="json", log_level="warning"))
asyncio.run(main(*sys.argv[1:]))
"""


def wait_until_gone(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], WITHIN_S)[0], f"process {pid} is still there"
    finally:
        os.close(fd)


@pytest.mark.parametrize("child_is", ["idle", "inside a step", "inside llama_decode"])
def test_a_child_ends_with_its_parent_that_is_killed(child_is: str, script: Script, tmp_path: Path) -> None:
    gated = script({"when": "wait", "gate": str(tmp_path / "never")})
    arguments = {
        "idle": ["", *gated],
        "inside a step": ["wait", *gated],
        "inside llama_decode": [LAZY_DOG * 190],
    }[child_is]
    command = [sys.executable, "-c", PARENT, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    wait_until_gone(child)


async def test_an_engine_that_hangs_at_its_load_is_killed(script: Script, tmp_path: Path) -> None:
    timings = LocalTimings(load_watch_s=0.05, silent_s=0.1)
    argv = script({"model": "smollm2", "load_gate": str(tmp_path / "gate")})
    async with asyncio.timeout(WITHIN_S):
        with pytest.raises(EngineDied, match="sent nothing for"):
            await LocalEngine.start(load(), argv, timings=timings)


async def test_a_step_that_was_sent_before_a_cancel_does_not_answer_it(script: Script) -> None:
    timings = LocalTimings(silent_after_cancel_s=0.1)
    engine = await LocalEngine.start(load(), script({"step_s": 0.01, "reply": "x" * 9999}), timings=timings)
    submitted = submit("long", max_tokens=9999)
    running = asyncio.create_task(run(engine, submitted))
    await asyncio.sleep(0)
    os.kill(engine.pid, signal.SIGSTOP)
    engine.cancel(submitted.sequence_id)
    engine._handle(Step([Advance(sequence_id=submitted.sequence_id, prompt_tokens=1, prompt_done=1, prompt_reused=0)]))
    engine.watch(timings.silent_after_cancel_s)
    async with asyncio.timeout(WITHIN_S):
        with pytest.raises(EngineDied, match="sent nothing for"):
            await running
    await engine.stop()


async def test_a_death_ends_every_run_at_once(script: Script) -> None:
    argv = script(
        {"when": "die", "signal": signal.SIGSEGV.value},
        {"when": "other", "step_s": 0.01, "reply": "x" * 9999},
    )
    async with started(argv, n_slots=2) as engine:
        other = asyncio.create_task(run(engine, submit("other", max_tokens=9999)))
        with pytest.raises(EngineDied, match="SIGSEGV"):
            await run(engine, submit("die"))
        with pytest.raises(EngineDied, match="SIGSEGV"):
            await other
        with pytest.raises(EngineDied):
            await run(engine, submit("more"))


async def test_a_death_while_idle_is_noticed(script: Script) -> None:
    async with started(script()) as engine:
        os.kill(engine.pid, signal.SIGKILL)
        async with asyncio.timeout(WITHIN_S):
            await engine.died.wait()
        with pytest.raises(EngineDied, match="SIGKILL.*memory"):
            await run(engine, submit("Hi"))
        engine.cancel(1)


async def test_a_refusal_carries_its_reason_and_the_engine_goes_on(script: Script) -> None:
    async with started(script({"when": "bad", "refuse": "Model exploded"})) as engine:
        with pytest.raises(EngineRefused, match="^Model exploded$"):
            await run(engine, submit("bad"))
        assert (await run(engine, submit("good"))).text


async def test_a_cancel_goes_past_turns_that_are_hard_to_prepare(script: Script, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with started(script({"when": "hard", "prepare_gate": str(gate)}, {"when": "hi", "reply": "yo"})) as engine:
        hard, behind, after = submit("hard"), submit("hi"), submit("hi")
        runs = [asyncio.create_task(run(engine, one)) for one in (hard, behind)]
        await asyncio.sleep(0)
        for one in (behind, hard):
            engine.cancel(one.sequence_id)
        for reply in await asyncio.gather(*runs):
            assert (reply.finish, reply.text) == ("cancelled", "")
        gate.touch()
        assert (await run(engine, after)).text == "yo"


@pytest.mark.parametrize("kind", ["fake", "real"])
async def test_stop_ends_the_child_and_reaps_it(script: Script, kind: str) -> None:
    engine = await LocalEngine.start(load(), script() if kind == "fake" else None)
    await engine.stop()
    assert engine.died.is_set()
    with pytest.raises(ProcessLookupError):
        os.kill(engine.pid, 0)


async def test_stop_ends_a_child_in_the_middle_of_a_step(script: Script, tmp_path: Path) -> None:
    engine = await LocalEngine.start(load(), script({"when": "wait", "gate": str(tmp_path / "never")}))
    waiting = asyncio.create_task(run(engine, submit("wait")))
    await asyncio.sleep(0)
    await engine.stop()
    with pytest.raises(EngineDied):
        await waiting


LOAD = frames.encode(load())


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="another protocol"),
        pytest.param(struct.pack(">I", 5) + b"\xc1\xc1\xc1\xc1\xc1", id="no msgpack"),
        pytest.param(struct.pack(">I", 0xFFFFFFFF), id="too long"),
        pytest.param(frames.encode(Loading(1.0)), id="a message of the other direction"),
        pytest.param(frames.encode(Cancel(1)), id="not a load first"),
        pytest.param(LOAD + LOAD, id="two loads"),
        pytest.param(LOAD + frames.encode(submit("Hi"))[:-1] + b"\xc1", id="a broken one later"),
    ],
)
@pytest.mark.parametrize("kind", ["fake", "real"])
def test_a_child_that_receives_nonsense_ends_with_an_error(sent: bytes, kind: str, script: Script) -> None:
    argv = script() if kind == "fake" else REAL_ENGINE
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        subprocess.Popen(
            [*argv, "--fd", str(theirs.fileno())], pass_fds=[theirs.fileno()], stderr=subprocess.PIPE
        ) as child,
    ):
        ours.sendall(sent)
        _, stderr = child.communicate(timeout=WITHIN_S)
    assert child.returncode == 1
    assert stderr.strip()


async def test_a_child_that_sends_nonsense_is_ended(tmp_path: Path) -> None:
    program = tmp_path / "liar.py"
    program.write_text(
        "import socket, sys, threading\n"
        "s = socket.socket(fileno=int(sys.argv[-1]))\n"
        "s.sendall(b'GET / HTTP/1.1')\n"
        "threading.Event().wait()\n"
    )
    async with asyncio.timeout(WITHIN_S):
        with pytest.raises(EngineDied):
            await LocalEngine.start(load(), [sys.executable, str(program)])


async def test_a_flood_on_stderr_neither_stalls_the_child_nor_hides_its_last_words(tmp_path: Path) -> None:
    program = tmp_path / "loud.py"
    program.write_text(
        "import sys\nprint('x' * 5_000_000, file=sys.stderr)\nprint('last words', file=sys.stderr)\nsys.exit(3)\n"
    )
    async with asyncio.timeout(WITHIN_S):
        with pytest.raises(EngineDied, match="exit code 3. last words"):
            await LocalEngine.start(load(), [sys.executable, str(program)])


STARTS_AN_ENGINE = """
import sys, uvloop
from llamalith_app.engine.client.local import LocalEngine
from tests.engine.conftest import load
uvloop.run(LocalEngine.start(load(), ["sh", "-c", 'echo $$ > "$0"; exec sleep 600', sys.argv[1]]))
"""


async def test_an_engine_that_is_stopped_before_it_has_begun_dies_with_its_worker(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", STARTS_AN_ENGINE, str(path), cwd=ROOT)

    async def begun() -> int | None:
        text = path.read_text() if path.exists() else ""
        return int(text) if text.endswith("\n") else None

    async def gone() -> bool:
        try:
            return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return True

    pid = await eventually(begun)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    worker.kill()
    await worker.wait()
    await eventually(gone)
