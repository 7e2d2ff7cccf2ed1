"""The engine process: connects the real runner (llama.cpp) to the worker's socket.

The worker starts it (`engine/client/local.py`) with the number of an open socket.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal

from llamalith_app.engine.child import serve
from llamalith_app.engine.runner import LlamaRunner
from llamalith_app.supervise import signals

# A supervisor signals all processes of a service at once. The worker drains first and then ends this process.
for number in signals.requests_to_end():
    signal.signal(number, signal.SIG_IGN)
# The worker may run at a lower priority, which this process would inherit.
with contextlib.suppress(AttributeError, OSError):
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
parser = argparse.ArgumentParser(prog="llamalith engine")
parser.add_argument("--fd", type=int, required=True, help="the socket to the worker")
serve(parser.parse_args().fd, LlamaRunner)
