"""The engine child's composition root: llama.cpp at one end, the worker's socket at the other."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal

from llamalith_app.engine.child import serve
from llamalith_app.engine.runner import LlamaRunner
from llamalith_app.supervise import signals

# Its worker drains first, and ends it then: supervisors signal every process of a service at once.
for number in signals.requests_to_end():
    signal.signal(number, signal.SIG_IGN)
# The worker that started it gives way to it.
with contextlib.suppress(AttributeError, OSError):
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
parser = argparse.ArgumentParser(prog="llamalith engine")
parser.add_argument("--fd", type=int, required=True, help="the socket to the worker")
serve(parser.parse_args().fd, LlamaRunner)
