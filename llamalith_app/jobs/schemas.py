"""Has JSON Schemas judged, and replies validated, by processes of their own, so that an evil one costs a bounded time
and nobody waits.

Remembers the verdicts of the newest schemas: callers send the same ones again and again.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
import sys
from collections import OrderedDict
from typing import Any, NamedTuple

import msgspec
import structlog

from llamalith_app.contracts.parameters import WantedSchema
from llamalith_app.errors import BadInput, ValidatorBusy
from llamalith_app.grammars import validation
from llamalith_app.grammars.schema import CPU_S, MAX_SCHEMA_BYTES, Verdict
from llamalith_app.settings.environment import child_environ

AT_ONCE = 2
WITHIN_S = 4.5
"""From the request to the answer, the wait for others included."""
REMEMBERED = 1000
MAX_PLACE = 300
"""Characters of a pointer that an answer tells."""
UNLESS_STRICT = "without strict it is taken, and the whole reply is validated at its end"

FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What ends such a process and says nothing of its schema: an administrator, a supervisor, a terminal."""

log = structlog.get_logger(__name__)


class SchemaValidator:
    def __init__(self) -> None:
        self._places = asyncio.Semaphore(AT_ONCE)
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        """By the schema's digest, the newest last."""

    async def judge(self, wanted: WantedSchema) -> tuple[str, ...]:
        """The places of what no reply can be held to while it is written; a strict schema has none.

        Raises BadInput, naming the part that is why, for a schema that no reply can be held to; or JudgeBusy.
        """
        text = msgspec.json.encode(wanted.schema)
        if len(text) > MAX_SCHEMA_BYTES:
            raise BadInput(f"{wanted.place}: {len(text)} bytes; a schema has at most {MAX_SCHEMA_BYTES}")
        digest = hashlib.sha256(text).digest()
        verdict = self._verdicts.pop(digest, None)
        if verdict is None:
            verdict = await self._judged(text)
        self._verdicts[digest] = verdict
        if len(self._verdicts) > REMEMBERED:
            self._verdicts.popitem(last=False)
        if verdict.reason is not None:
            raise BadInput(f"{wanted.place}: at {verdict.at[:MAX_PLACE]}: {verdict.reason}")
        if wanted.strict and verdict.gaps:
            first = verdict.gaps[0]
            raise BadInput(f"{wanted.place}: at {first.at[:MAX_PLACE]}: {first.reason}; {UNLESS_STRICT}")
        return tuple(gap.at for gap in verdict.gaps)

    async def _judged(self, text: bytes) -> Verdict:
        try:
            async with asyncio.timeout(WITHIN_S), self._places:
                return await _verdict(text)
        except TimeoutError:
            raise ValidatorBusy("The schema could not be judged in time; try again.") from None


class Fit(NamedTuple):
    """What a validation of a whole reply found."""

    is_valid: bool | None
    """None: it could not be validated."""
    problem: str | None
    """Of a reply that does not fit, the first part that does not; or why it could not be validated."""


class ReplyValidator:
    def __init__(self) -> None:
        self._places = asyncio.Semaphore(AT_ONCE)

    async def validate(self, schema: dict[str, Any], reply: str) -> Fit:
        """Within seconds; raises nothing."""
        task = msgspec.json.encode(validation.Task(schema, reply))
        try:
            async with asyncio.timeout(WITHIN_S), self._places:
                ended = await _run("llamalith_app.grammars.validation", task)
                if -ended.returncode in FROM_OUTSIDE:
                    ended = await _run("llamalith_app.grammars.validation", task)
        except TimeoutError:
            return Fit(None, f"could not be validated within {WITHIN_S:g} s")
        except OSError as error:
            log.error("a reply's validation failed", reason=str(error))
            return Fit(None, "could not be validated")
        if ended.returncode == 0:
            problem = msgspec.json.decode(ended.told, type=validation.Result).problem
            return Fit(not problem, problem or None)
        if ended.returncode == -signal.SIGPROF:
            return Fit(None, f"could not be validated within {validation.CPU_S:g} s of processor time")
        log.error("a reply's validation failed", complaint=ended.complaint.decode(errors="replace")[-1000:])
        return Fit(None, "could not be validated")


class _Ended(NamedTuple):
    told: bytes
    complaint: bytes
    returncode: int


async def _run(module: str, text: bytes) -> _Ended:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", module),
        env=child_environ({}),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        told, complaint = await process.communicate(text)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return _Ended(told, complaint, process.returncode or 0)


async def _verdict(text: bytes) -> Verdict:
    ended = await _run("llamalith_app.grammars.schema", text)
    told, complaint = ended.told, ended.complaint
    if lines := told.splitlines():
        # The last one; it may have been stopped while it looked for a smaller part that is why.
        return msgspec.json.decode(lines[-1], type=Verdict)
    if -ended.returncode in FROM_OUTSIDE or (ended.returncode > 0 and b"MemoryError" not in complaint):
        # Not by its own limits: that says nothing of the schema.
        log.error("a schema's judge failed", complaint=complaint.decode(errors="replace")[-1000:])
        raise ValidatorBusy("The schema could not be judged; try again.")
    return Verdict(
        reason=f"takes more than {CPU_S:g} s of processor time or too much memory to compile; make it simpler:"
        " fewer patterns, and fewer choices within allOf"
    )
