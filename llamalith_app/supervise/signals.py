"""Which signals ask our processes to stop, and which of them count as a second request.

Used by every command. Does not know how a process stops.
"""

from __future__ import annotations

import signal


def requests_to_end() -> tuple[signal.Signals, ...]:
    """SIGTERM, SIGINT and SIGHUP; without SIGHUP if it is ignored from the start, as under nohup."""
    always = (signal.SIGTERM, signal.SIGINT)
    return always if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (*always, signal.SIGHUP)


def kills_when_repeated(number: int) -> bool:
    """Whether this signal counts when a second one stops a process at once.

    SIGHUP does not: a closing terminal, and systemd with SendSIGHUP, send it together with SIGTERM and mean one drain.
    """
    return number != signal.SIGHUP
