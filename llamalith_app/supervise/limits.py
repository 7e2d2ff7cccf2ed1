"""The limits that a short-lived program of ours sets for itself, because what it reads can be malicious."""

from __future__ import annotations

import resource
import signal

from llamalith_app.supervise import parent


def limit(cpu_s: float, address_space_bytes: int) -> None:
    """Limits the calling process: to its parent's life, to seconds of processor time (SIGPROF ends it) and to bytes of
    memory (MemoryError)."""
    parent.die_with_parent()
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    resource.setrlimit(resource.RLIMIT_AS, (address_space_bytes, address_space_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
