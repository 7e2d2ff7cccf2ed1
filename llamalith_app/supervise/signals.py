"""Which signals ask a process of ours to end, and what counts as being asked twice.

Knows nothing of how a process ends.
"""

from __future__ import annotations

import signal


def requests_to_end() -> tuple[signal.Signals, ...]:
    """SIGTERM, SIGINT and SIGHUP; without SIGHUP where whoever started this process has it ignored, as nohup does."""
    always = (signal.SIGTERM, signal.SIGINT)
    return always if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (*always, signal.SIGHUP)


def insists(number: int) -> bool:
    """Does this signal count where a second one ends a process at once?

    SIGHUP does not: a terminal that closes and systemd with SendSIGHUP send it beside SIGTERM, and mean one drain.
    """
    return number != signal.SIGHUP
