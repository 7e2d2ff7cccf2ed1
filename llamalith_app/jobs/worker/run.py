"""The life of a worker process: it starts a worker, and drains it when a signal asks the process to end.

Knows the signals. Does not know what a worker does (`process.py`).
"""

from __future__ import annotations

import asyncio
import os

import structlog

from llamalith_app.engine.client.protocol import EngineFactory
from llamalith_app.jobs.worker.process import TIMINGS, Worker, WorkerTimings
from llamalith_app.settings.config import Config
from llamalith_app.supervise import signals

log = structlog.get_logger(__name__)


async def run(
    config: Config,
    *,
    grace_s: float,
    engines: EngineFactory | None = None,
    timings: WorkerTimings = TIMINGS,
    supervised: bool = False,
) -> None:
    """Runs until SIGTERM, SIGINT or SIGHUP, then drains; a second SIGTERM or SIGINT ends the process at once.

    `supervised`: by `up`, which uses SIGKILL for that. While `up` lives, a second SIGTERM only means that somebody else
    signals all processes of the service, as systemd does. Once `up` is gone, it means that the next `up` wants to
    start, which can as soon as the jobs are given back.
    """
    parent_pid = os.getppid()
    ended = asyncio.Event()
    insisted = False
    loop = asyncio.get_running_loop()
    worker = Worker(config, engines, timings=timings)

    def on_signal(number: int) -> None:
        nonlocal insisted
        if insisted and signals.kills_when_repeated(number):
            if not supervised:
                os._exit(128 + number)
            if os.getppid() != parent_pid:
                worker.hurry()
        insisted |= signals.kills_when_repeated(number)
        ended.set()

    for number in signals.requests_to_end():
        loop.add_signal_handler(number, on_signal, number)
    starting, asked_to_end = asyncio.ensure_future(worker.start()), asyncio.ensure_future(ended.wait())
    await asyncio.wait((starting, asked_to_end), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        # Nothing is claimed before the end of the start; a row of this worker is swept as one of a dead worker.
        log.info("worker ended before it was ready")
        return
    await starting
    await asked_to_end
    await worker.drain(grace_s)
