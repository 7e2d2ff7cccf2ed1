"""Has JSON Schemas judged by a process of their own, so that an evil one costs a bounded time and nobody waits.

Remembers the verdicts of the newest schemas: callers send the same ones again and again.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
import sys
from collections import OrderedDict
from typing import Any

import msgspec
import structlog

from llamalith_app import config
from llamalith_app.errors import BadInput, JudgeBusy
from llamalith_app.schema import CPU_S, MAX_SCHEMA_BYTES, Verdict

PLACE = "response_format.json_schema.schema"
AT_ONCE = 2
WITHIN_S = 4.5
"""From the request to the answer, the wait for others included."""
REMEMBERED = 1000

log = structlog.get_logger(__name__)


class SchemaJudge:
    def __init__(self) -> None:
        self._places = asyncio.Semaphore(AT_ONCE)
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        """By the schema's digest, the newest last."""

    async def judge(self, schema: dict[str, Any]) -> None:
        """Raises BadInput, naming the part that is why, for a schema that no reply can be held to; or JudgeBusy."""
        text = msgspec.json.encode(schema)
        if len(text) > MAX_SCHEMA_BYTES:
            raise BadInput(f"{PLACE}: {len(text)} bytes; a schema has at most {MAX_SCHEMA_BYTES}")
        digest = hashlib.sha256(text).digest()
        verdict = self._verdicts.pop(digest, None)
        if verdict is None:
            verdict = await self._judged(text)
        self._verdicts[digest] = verdict
        if len(self._verdicts) > REMEMBERED:
            self._verdicts.popitem(last=False)
        if verdict.reason is not None:
            raise BadInput(f"{PLACE}: at {verdict.at}: {verdict.reason}")

    async def _judged(self, text: bytes) -> Verdict:
        try:
            async with asyncio.timeout(WITHIN_S), self._places:
                return await _run(text)
        except TimeoutError:
            raise JudgeBusy("The schema could not be judged in time; try again.") from None


async def _run(text: bytes) -> Verdict:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "llamalith_app.schema"),
        env=config.child_environ({}),
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
    if lines := told.splitlines():
        # The last one; it may have been stopped while it looked for a smaller part that is why.
        return msgspec.json.decode(lines[-1], type=Verdict)
    if process.returncode == -signal.SIGKILL or ((process.returncode or 0) > 0 and b"MemoryError" not in complaint):
        # Not by its own limits: that says nothing of the schema.
        log.error("a schema's judge failed", complaint=complaint.decode(errors="replace")[-1000:])
        raise JudgeBusy("The schema could not be judged; try again.")
    return Verdict(
        reason=f"takes more than {CPU_S:g} s of processor time or too much memory to compile; make it simpler:"
        " fewer patterns, and fewer choices within allOf"
    )
