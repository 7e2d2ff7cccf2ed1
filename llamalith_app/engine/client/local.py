"""The engine that is a child process of the worker: starts it, speaks its messages, and notices its death at once.

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
from llamalith_app.engine.client.protocol import EngineDied, EngineLimits, EngineLoadFailed, EngineRefused
from llamalith_app.engine.messages import (
    Advance,
    AnswerNow,
    Cancel,
    End,
    FromEngine,
    GpuOffload,
    Loaded,
    LoadFailed,
    Loading,
    LoadModel,
    Refused,
    Submit,
    ToEngine,
)
from llamalith_app.errors import LlamalithError
from llamalith_app.settings.environment import child_environ
from llamalith_app.supervise import parent

REAL_ENGINE = (sys.executable, "-P", "-m", "llamalith_app.engine")
KEPT_LINES = 20


class LocalTimings(msgspec.Struct, frozen=True, kw_only=True):
    """How long the worker waits for a child."""

    save_s: float = 10.0
    """What a child gets at its end to save what its slots hold."""
    end_s: float = 5.0
    """What it gets after that until it is killed."""
    stuck_s: float = 1.0
    """What a child gets at its end that still has runs: it has hung."""
    silent_s: float = 1800.0
    """A child that loads or has work and sends nothing for so long is killed; it sends something with each step. A step
    takes a fraction of a second, but the first one may read all weights from a slow disk, and so may the check of a
    pinned hash."""
    silent_after_cancel_s: float = 300.0
    """The same after a cancel, which the child handles between two steps."""
    load_watch_s: float = 5.0
    """How often a child that loads is checked for silence."""


DEFAULT_TIMINGS = LocalTimings()

CHILD_SETTINGS = {
    # ggml_abort would start a debugger where there is one, and hold the dying child for seconds.
    "GGML_NO_BACKTRACE": "1",
    # How long llama.cpp's threads spin for each other before they sleep. By OpenMP's default one more busy
    # process on the cores costs 95 % of the tokens; so short a spin costs none of them on free cores.
    "GOMP_SPINCOUNT": "300",
}
"""Of the child's environment, unless the operator's own says otherwise."""

log = structlog.get_logger(__name__)


class LocalEngine:
    """Made by `start`, which returns once the model is loaded; ended by `stop`."""

    limits: EngineLimits
    load_s: float

    def __init__(
        self,
        model: str,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        on_progress: Callable[[float], None] | None,
        timings: LocalTimings,
    ) -> None:
        self.model = model
        self.died = asyncio.Event()
        self._process = process
        self._writer = writer
        self._on_progress = on_progress
        self._timings = timings
        self._runs: dict[int, asyncio.Queue[Advance | LlamalithError]] = {}
        """The steps of each sequence that have not been read yet, by its id."""
        self._last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._loading: asyncio.Future[Loaded] = asyncio.get_running_loop().create_future()
        # Its result may be asked for by nobody any more.
        self._loading.add_done_callback(lambda loading: loading.cancelled() or loading.exception())
        self._is_stopping = False
        self._silent_s = 0.0
        """How long the child has had work and sent nothing, as far as this process ran to see it."""
        self._cancelled: set[int] = set()
        """Sequences whose cancel the child has not answered. Steps that it had sent before are no answer."""
        self._has_hung = False
        self._receiving = asyncio.create_task(self._receive(reader))
        self._keeping_lines = asyncio.create_task(self._keep_lines())

    @classmethod
    async def start(
        cls,
        load: LoadModel,
        argv: Sequence[str] | None = None,
        *,
        on_progress: Callable[[float], None] | None = None,
        timings: LocalTimings = DEFAULT_TIMINGS,
    ) -> Self:
        """Starts a child by `argv` (None: the real engine) and returns once it has loaded the model; `on_progress` is
        called with how far the load is, from 0 to 1.

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
                    # Ctrl-C in a terminal is not for the child: it ends when its worker does.
                    start_new_session=True,
                    # The child sees by itself that its worker is gone, but not while it is stopped or hung.
                    preexec_fn=parent.preexec_die_with_parent(signal.SIGKILL),
                    env=child_environ(CHILD_SETTINGS),
                )
            streams = await asyncio.open_connection(sock=ours)
        except BaseException:
            # A child that was started meanwhile ends when it sees the closed socket.
            ours.close()
            raise
        engine = cls(load.model, process, *streams, on_progress=on_progress, timings=timings)
        try:
            engine._send(load)
            loaded = await engine._wait_until_loaded()
        except BaseException:
            await engine.stop()
            raise
        engine.limits = EngineLimits(
            loaded.n_ctx, loaded.n_slots, loaded.family, frozenset(loaded.marker_tokens), loaded.format
        )
        engine.load_s = loaded.load_s
        return engine

    @property
    def pid(self) -> int:
        return self._process.pid

    async def run(self, request: Submit) -> AsyncGenerator[Advance, None]:
        steps: asyncio.Queue[Advance | LlamalithError] = asyncio.Queue()
        self._runs[request.sequence_id] = steps
        has_ended = False
        try:
            if self.died.is_set():
                raise EngineDied(self._death_reason())
            self._send(request)
            while not has_ended:
                step = await steps.get()
                has_ended = isinstance(step, LlamalithError) or step.finish is not None
                if isinstance(step, LlamalithError):
                    raise step
                yield step
        finally:
            del self._runs[request.sequence_id]
            self._cancelled.discard(request.sequence_id)
            if not has_ended:
                self.cancel(request.sequence_id)

    def cancel(self, sequence_id: int) -> None:
        if not self.died.is_set():
            if sequence_id in self._runs:
                self._cancelled.add(sequence_id)
            self._send(Cancel(sequence_id))

    def answer_now(self, sequence_id: int) -> None:
        if not self.died.is_set():
            self._send(AnswerNow(sequence_id))

    def watch(self, elapsed_s: float) -> None:
        if not self._runs:
            self._silent_s = 0.0
            return
        timings = self._timings
        self._count_silence(elapsed_s, timings.silent_after_cancel_s if self._cancelled else timings.silent_s)

    async def stop(self) -> None:
        """A child that has loaded its model saves its states first. One that still has runs, which were cancelled
        before this, has hung and gets `stuck_s` in all."""
        timings = self._timings
        self._is_stopping = True
        is_stuck = bool(self._runs)
        if self._loading.done() and not self._loading.cancelled() and self._loading.exception() is None:
            self._send(End())
            await self._exits_within(timings.stuck_s if is_stuck else timings.save_s)
        self._writer.close()
        if not await self._exits_within(0 if is_stuck else timings.end_s):
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        await asyncio.gather(self._receiving, self._keeping_lines, return_exceptions=True)

    async def _wait_until_loaded(self) -> Loaded:
        timings = self._timings
        while not (await asyncio.wait({self._loading}, timeout=timings.load_watch_s))[0]:
            self._count_silence(timings.load_watch_s, timings.silent_s)
        return self._loading.result()

    def _count_silence(self, elapsed_s: float, limit_s: float) -> None:
        """Counted, not measured: a worker that was frozen has received nothing either."""
        self._silent_s += elapsed_s
        if self._silent_s >= limit_s and not self._has_hung:
            self._has_hung = True
            log.error("engine has hung", model=self.model, pid=self.pid, silent_s=self._silent_s)
            self._process.kill()

    async def _exits_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._process.wait()
        except TimeoutError:
            return False
        return True

    def _send(self, message: ToEngine) -> None:
        # A transport that closes by itself raises at a write; `_receive` handles the death anyway.
        if not self._writer.is_closing():
            self._writer.write(frames.encode(message))

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        try:
            while (message := await frames.read_async(reader, decoder)) is not None:
                self._handle(message)
        except frames.BrokenFrame as error:
            log.error("broken frame from the engine", model=self.model, reason=str(error))
            self._process.kill()
        await self._process.wait()
        await asyncio.gather(self._keeping_lines, return_exceptions=True)
        self.died.set()
        self._writer.close()
        reason = self._death_reason()
        if not self._is_stopping:
            log.warning("engine died", model=self.model, pid=self.pid, reason=reason)
        if not self._loading.done():
            self._loading.set_exception(EngineDied(reason))
        for steps in self._runs.values():
            steps.put_nowait(EngineDied(reason))

    def _handle(self, message: FromEngine) -> None:
        self._silent_s = 0.0
        match message:
            case Loaded():
                if message.gpu is not None:
                    self._log_offload(message.gpu)
                self._loading.set_result(message)
            case LoadFailed(reason):
                self._loading.set_exception(EngineLoadFailed(reason))
            case Loading(progress):
                log.debug("model loading", model=self.model, progress=round(progress, 2))
                if self._on_progress is not None:
                    self._on_progress(progress)
            case Refused():
                self._cancelled.discard(message.sequence_id)
                if steps := self._runs.get(message.sequence_id):
                    steps.put_nowait(EngineRefused(message.kind, message.reason))
            case _:
                for advance in message.sequences:
                    if advance.finish is not None:
                        self._cancelled.discard(advance.sequence_id)
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
        """Keeps the end of what the child writes to stderr, which native code uses as it likes; a long line comes in
        parts."""
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

    def _death_reason(self) -> str:
        code = self._process.returncode
        if code is not None and code < 0:
            how = f"The engine was ended by {_signal_name(-code)}"
            if self._has_hung:
                how = f"The engine sent nothing for {self._silent_s:g} s and was ended"
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
