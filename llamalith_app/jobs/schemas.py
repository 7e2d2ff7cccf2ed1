"""Validates JSON Schemas and whole replies in processes of their own, so that a malicious one costs bounded time.

Owns the number of processes at a time, the time that one may take, and a cache of verdicts, because callers send the
same schemas again and again. The web validates schemas as it accepts jobs; the worker validates replies. The programs
are `grammars/schema.py` and `grammars/validation.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
from collections import OrderedDict
from typing import Any, NamedTuple

import msgspec
import structlog

from llamalith_app.contracts.parameters import WantedSchema
from llamalith_app.errors import BadInput, ValidatorBusy
from llamalith_app.grammars import validation
from llamalith_app.grammars.schema import CPU_S, MAX_SCHEMA_BYTES, Verdict
from llamalith_app.supervise import program

MAX_PROGRAMS = 2
MAX_REMEMBERED = 1000
MAX_POINTER_CHARS = 300
"""Characters of a pointer that are shown."""
UNLESS_STRICT = "without strict it is taken, and the whole reply is validated at its end"

TIMEOUT_S = 4.5
"""For one validation, the wait for a free process included."""

log = structlog.get_logger(__name__)


class SchemaValidator:
    """Validates schemas, and remembers the verdicts on the newest ones."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._programs = asyncio.Semaphore(MAX_PROGRAMS)
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        """By the schema's digest, the newest last."""

    async def validate(self, wanted: WantedSchema) -> tuple[str, ...]:
        """Returns the JSON pointers to the keywords that cannot be enforced while a reply is written. A strict schema
        has none.

        Raises BadInput, which names the part, for a schema that no reply can be held to, and ValidatorBusy if the
        validation could not be completed in time.
        """
        text = msgspec.json.encode(wanted.schema)
        if len(text) > MAX_SCHEMA_BYTES:
            raise BadInput(f"{wanted.place}: {len(text)} bytes; a schema has at most {MAX_SCHEMA_BYTES}")
        digest = hashlib.sha256(text).digest()
        verdict = self._verdicts.pop(digest, None)
        if verdict is None:
            verdict = await self._validate_new(text)
        self._verdicts[digest] = verdict
        if len(self._verdicts) > MAX_REMEMBERED:
            self._verdicts.popitem(last=False)
        if verdict.reason is not None:
            raise BadInput(f"{wanted.place}: at {verdict.at[:MAX_POINTER_CHARS]}: {verdict.reason}")
        if wanted.strict and verdict.gaps:
            first = verdict.gaps[0]
            raise BadInput(f"{wanted.place}: at {first.at[:MAX_POINTER_CHARS]}: {first.reason}; {UNLESS_STRICT}")
        return tuple(gap.at for gap in verdict.gaps)

    async def _validate_new(self, text: bytes) -> Verdict:
        try:
            async with asyncio.timeout(self._timeout_s), self._programs:
                return await _compute_verdict(text)
        except TimeoutError:
            raise ValidatorBusy("The schema could not be validated in time; try again.") from None


class Fit(NamedTuple):
    """The result of the validation of a whole reply."""

    is_valid: bool | None
    """None: the reply could not be validated."""
    problem: str | None
    """The first part of the reply that does not fit, or why the reply could not be validated; None: it fits."""


class ReplyValidator:
    """Validates whole replies."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._programs = asyncio.Semaphore(MAX_PROGRAMS)

    async def validate(self, schema: dict[str, Any], reply: str) -> Fit:
        """Returns within `timeout_s` seconds. Raises nothing."""
        task = msgspec.json.encode(validation.Task(schema, reply))
        try:
            async with asyncio.timeout(self._timeout_s), self._programs:
                result = await program.run("llamalith_app.grammars.validation", task)
                if result.is_ended_from_outside:
                    result = await program.run("llamalith_app.grammars.validation", task)
        except TimeoutError:
            return Fit(None, f"could not be validated within {self._timeout_s:g} s")
        except OSError as error:
            log.error("a reply's validation failed", reason=str(error))
            return Fit(None, "could not be validated")
        if result.returncode == 0:
            problem = msgspec.json.decode(result.stdout, type=validation.Result).problem
            return Fit(not problem, problem or None)
        if result.returncode == -signal.SIGPROF:
            return Fit(None, f"could not be validated within {validation.CPU_S:g} s of processor time")
        log.error("a reply's validation failed", complaint=result.complaint)
        return Fit(None, "could not be validated")


async def _compute_verdict(text: bytes) -> Verdict:
    result = await program.run("llamalith_app.grammars.schema", text)
    if lines := result.stdout.splitlines():
        # The program may have been ended while it searched for a smaller part that is why. The last verdict is valid.
        return msgspec.json.decode(lines[-1], type=Verdict)
    if result.is_ended_from_outside or (result.returncode > 0 and b"MemoryError" not in result.stderr):
        # Its own limits did not end it, so the schema is not the reason.
        log.error("a schema's validation failed", complaint=result.complaint)
        raise ValidatorBusy("The schema could not be validated; try again.")
    return Verdict(
        reason=f"takes more than {CPU_S:g} s of processor time or too much memory to compile; make it simpler:"
        " fewer patterns, and fewer choices within allOf"
    )
