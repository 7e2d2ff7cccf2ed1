"""The worker's side of an engine: starts the child, speaks its messages, and notices its death at once.

One process holds one model until it ends. Knows no jobs; a run is a sequence id and its advances.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Self

import msgspec
import structlog

from llamalith_app.engine import frames
from llamalith_app.engine.messages import (
    Advance,
    Cancel,
    End,
    FromEngine,
    GpuOffload,
    Loaded,
    LoadFailed,
    Loading,
    LoadModel,
    RefusalKind,
    Refused,
    Submit,
    ToEngine,
)
from llamalith_app.errors import LlamalithError
from llamalith_app.settings.environment import child_environ
from llamalith_app.supervise import parent

REAL_ENGINE = (sys.executable, "-P", "-m", "llamalith_app.engine")
SAVE_S = 10.0
"""Seconds that a child gets at its end to save what its slots hold."""
END_S = 5.0
"""Seconds more until it is killed."""
STUCK_S = 1.0
SILENT_S = 1800.0
"""Seconds for which an engine that loads or has work may tell nothing; it tells something with each step. Then it is
killed. A step takes a fraction of a second, but the first one may read all weights from a slow disk, and so may the
comparing of a pinned hash."""
LOOK_S = 5.0
"""Between looks at one that loads."""
SILENT_AFTER_CANCEL_S = 300.0
"""The same once it was told to end something, which it looks at between two steps."""
KEPT_LINES = 20

CHILD_SETTINGS = {
    # ggml_abort would start a debugger where there is one, and hold the dying child for seconds.
    "GGML_NO_BACKTRACE": "1",
    # How long llama.cpp's threads spin for each other before they sleep. By OpenMP's default one more busy
    # process on the cores costs 95 % of the tokens; so short a spin costs none of them on free cores.
    "GOMP_SPINCOUNT": "300",
}
"""Of the child's environment, unless the operator's own says otherwise."""

log = structlog.get_logger(__name__)


class EngineLoadFailed(LlamalithError):
    """The model cannot be loaded; the reason names it and its file."""


class EngineDied(LlamalithError):
    """The child ended while it had work; the reason says how."""


class EngineRefused(LlamalithError):
    """This sequence cannot run; the engine goes on."""

    def __init__(self, kind: RefusalKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class EngineProcess:
    """Made by `start`, which returns once the model is loaded; ended by `stop`."""

    loaded: Loaded

    def __init__(
        self,
        model: str,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        tell: Callable[[float], None] | None = None,
    ) -> None:
        self._tell_loading = tell
        self.model = model
        self.died = asyncio.Event()
        """Set when the child is gone, whoever ended it."""
        self._process = process
        self._writer = writer
        self._runs: dict[int, asyncio.Queue[Advance | LlamalithError]] = {}
        self._last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._loading: asyncio.Future[Loaded] = asyncio.get_running_loop().create_future()
        # Who waited for it may have gone.
        self._loading.add_done_callback(lambda loading: loading.cancelled() or loading.exception())
        self._stopping = False
        self._silent_s = 0.0
        """Since when it has work and told nothing, as far as this process was there to hear it."""
        self._cancels = False
        """It was told to end something and has told nothing since."""
        self._hung = False
        self._reading = asyncio.create_task(self._read(reader))
        self._lines = asyncio.create_task(self._keep_lines())

    @classmethod
    async def start(
        cls, load: LoadModel, argv: Sequence[str] | None = None, tell: Callable[[float], None] | None = None
    ) -> Self:
        """`tell` hears how far it is, from 0 to 1.

        Raises EngineLoadFailed, or EngineDied where the child died before it had loaded the model.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *(argv or REAL_ENGINE),
                    *("--fd", str(theirs.fileno())),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                    pass_fds=(theirs.fileno(),),
                    # Ctrl-C in a terminal is not for it: it ends when its worker does.
                    start_new_session=True,
                    # It sees by itself that its worker is gone, but not while it is stopped or hung.
                    preexec_fn=parent.preexec_die_with_parent(signal.SIGKILL),
                    env=child_environ(CHILD_SETTINGS),
                )
            streams = await asyncio.open_connection(sock=ours)
        except BaseException:
            # A child that was started meanwhile ends when it sees this.
            ours.close()
            raise
        engine = cls(load.model, process, *streams, tell=tell)
        try:
            engine._send(load)
            engine.loaded = await engine._has_loaded()
        except BaseException:
            await engine.stop()
            raise
        return engine

    @property
    def pid(self) -> int:
        return self._process.pid

    async def run(self, submit: Submit) -> AsyncGenerator[Advance, None]:
        """Its advances, the last with a `finish`; left before that, the sequence is cancelled.

        Raises EngineRefused, and EngineDied at once when the child dies.
        """
        steps: asyncio.Queue[Advance | LlamalithError] = asyncio.Queue()
        self._runs[submit.sequence_id] = steps
        ended = False
        try:
            if self.died.is_set():
                raise EngineDied(self._how_it_died())
            self._send(submit)
            while not ended:
                step = await steps.get()
                ended = isinstance(step, LlamalithError) or step.finish is not None
                if isinstance(step, LlamalithError):
                    raise step
                yield step
        finally:
            del self._runs[submit.sequence_id]
            if not ended:
                self.cancel(submit.sequence_id)

    def cancel(self, sequence_id: int) -> None:
        """Ends a run within one step, with finish `cancelled`; nothing happens for one that has ended."""
        if not self.died.is_set():
            self._cancels |= sequence_id in self._runs
            self._send(Cancel(sequence_id))

    def watch(self, seconds: float) -> None:
        """To be called every so many seconds: kills one that has hung, so that its runs end as with any other death."""
        if not self._runs:
            self._silent_s, self._cancels = 0.0, False
            return
        self._stays_silent(seconds, SILENT_AFTER_CANCEL_S if self._cancels else SILENT_S)

    async def _has_loaded(self) -> Loaded:
        while not (await asyncio.wait({self._loading}, timeout=LOOK_S))[0]:
            self._stays_silent(LOOK_S, SILENT_S)
        return self._loading.result()

    def _stays_silent(self, seconds: float, most_s: float) -> None:
        """Counted, not measured: a worker that was frozen has heard nothing either."""
        self._silent_s += seconds
        if self._silent_s >= most_s and not self._hung:
            self._hung = True
            log.error("engine has hung", model=self.model, pid=self.pid, silent_s=self._silent_s)
            self._process.kill()

    async def stop(self) -> None:
        """Ends the child and waits until it is gone. One that has loaded its model saves its states first; one that
        still has runs, which were cancelled before this, is taken for hung and gets STUCK_S seconds in all."""
        self._stopping = True
        is_stuck = bool(self._runs)
        if self._loading.done() and not self._loading.cancelled() and self._loading.exception() is None:
            self._send(End())
            await self._gone(STUCK_S if is_stuck else SAVE_S)
        self._writer.close()
        if not await self._gone(0 if is_stuck else END_S):
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        await asyncio.gather(self._reading, self._lines, return_exceptions=True)

    async def _gone(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                await self._process.wait()
        except TimeoutError:
            return False
        return True

    def _send(self, message: ToEngine) -> None:
        # A transport that closes by itself raises at a write; the reader tells of the death anyway.
        if not self._writer.is_closing():
            self._writer.write(frames.encode(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        try:
            while (message := await frames.read_async(reader, decoder)) is not None:
                self._take(message)
        except frames.BrokenFrame as error:
            log.error("broken frame from the engine", model=self.model, reason=str(error))
            self._process.kill()
        await self._process.wait()
        await asyncio.gather(self._lines, return_exceptions=True)
        self.died.set()
        self._writer.close()
        reason = self._how_it_died()
        if not self._stopping:
            log.warning("engine died", model=self.model, pid=self.pid, reason=reason)
        if not self._loading.done():
            self._loading.set_exception(EngineDied(reason))
        for steps in self._runs.values():
            steps.put_nowait(EngineDied(reason))

    def _take(self, message: FromEngine) -> None:
        self._silent_s, self._cancels = 0.0, False
        match message:
            case Loaded():
                if message.gpu is not None:
                    self._log_offload(message.gpu)
                self._loading.set_result(message)
            case LoadFailed(reason):
                self._loading.set_exception(EngineLoadFailed(reason))
            case Loading(progress):
                log.debug("model loading", model=self.model, progress=round(progress, 2))
                if self._tell_loading is not None:
                    self._tell_loading(progress)
            case Refused():
                if steps := self._runs.get(message.sequence_id):
                    steps.put_nowait(EngineRefused(message.kind, message.reason))
            case _:
                for advance in message.sequences:
                    if steps := self._runs.get(advance.sequence_id):
                        steps.put_nowait(advance)

    def _log_offload(self, gpu: GpuOffload) -> None:
        if gpu.n_layers:
            log.info("layers offloaded to the GPU", model=self.model, n_layers=gpu.n_layers, of=gpu.n_layers_total)
        else:
            log.warning(
                "n_gpu_layers is set, but llama.cpp finds no GPU: this build has no support for one, or the driver"
                " is missing; the model runs on the CPU",
                model=self.model,
                n_gpu_layers=gpu.requested,
            )

    async def _keep_lines(self) -> None:
        """What the child says on stderr, which native code uses as it likes; a long line comes in parts."""
        stderr = self._process.stderr
        rest = b""
        while stderr is not None and (part := await stderr.read(4096)):
            *lines, rest = (rest + part).split(b"\n")
            rest = rest[-1000:]
            for line in lines:
                self._keep_line(line)
        self._keep_line(rest)

    def _keep_line(self, line: bytes) -> None:
        if text := line.decode(errors="replace").strip():
            self._last_lines.append(text[:500])
            log.debug("engine says", model=self.model, line=text[:500])

    def _how_it_died(self) -> str:
        code = self._process.returncode
        if code is not None and code < 0:
            how = f"The engine was ended by {_signal_name(-code)}"
            if self._hung:
                how = f"The engine told nothing for {self._silent_s:g} s and was ended"
            elif -code == signal.SIGKILL:
                how += ", as the system does when memory runs out"
        else:
            how = f"The engine ended with exit code {code}"
        return f"{how}. {self._last_lines[-1]}" if self._last_lines else f"{how}."


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
