"""Python runs this file at the start of each process that has this folder in its PYTHONPATH.

In an engine process it notes when each step's frame is made, before the frame goes to the worker: one JSON line a step,
`[seconds, [[sequence, [token, …]], …]]`, in the file that BENCH_STAMPS names. It uses the machine's monotonic clock, so
that other processes can compare times. In every other process it does nothing.
"""

import json
import os
import sys
import time

if "llamalith_app.engine" in sys.orig_argv:
    from llamalith_app.engine import frames
    from llamalith_app.engine.messages import Step

    encode = frames.encode
    stamps = open(os.environ["BENCH_STAMPS"], "a", buffering=1)  # noqa: SIM115 - for the life of the process

    def stamped(message: object) -> bytes:
        if isinstance(message, Step):
            told = [[one.sequence_id, one.tokens] for one in message.sequences if one.tokens]
            stamps.write(json.dumps([time.monotonic(), told]) + "\n")
        return encode(message)  # type: ignore[arg-type]

    frames.encode = stamped
