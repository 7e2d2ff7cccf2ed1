"""One call: what it asks becomes a job, or joins the one that it left."""

from __future__ import annotations

import hashlib
from typing import Any

from litestar import Response

from llamalith_app.contracts.jobs import Job
from llamalith_app.errors import NotFound, UnknownModel
from llamalith_app.jobs.submit import JoinWindow
from llamalith_app.store.calls import Call
from llamalith_app.store.jobs import reads
from llamalith_app.web.openai.answers import WholeAnswer, stream_answer
from llamalith_app.web.openai.asked import Asked
from llamalith_app.web.openai.told import Telling
from llamalith_app.web.request import AppRequest

REPEATS = "x-stainless-retry-count"
"""The header in which OpenAI's own packages say how often they have sent a call before."""
REPEATED_WITHIN_S = 3600.0
"""Their clients wait for 10 minutes by default."""


async def submit(
    request: AppRequest,
    asked: Asked,
    *,
    is_stored: bool,
    is_background: bool = False,
    behind: int | None = None,
    idempotency_key: str | None = None,
) -> Job:
    """The job of this call, with its progress. `behind`: the turn that it continues. Raises what `Submissions.call`
    raises, and UnknownModel."""
    parts = request.parts
    if asked.request.model and asked.request.model not in parts.models:
        raise UnknownModel(f"model: {asked.request.model!r} is not offered here; these are: {', '.join(parts.models)}")
    key = await request.key(idempotency_key)
    job_id = await parts.submissions.call(
        request.principal,
        request.id,
        asked.request,
        asked.history,
        Call(None if is_background or key is not None else await _digest(request), is_stored, is_background),
        joins=JoinWindow(parts.calls.grace_s, REPEATED_WITHIN_S if _is_repeat(request) else None),
        behind=behind,
        key=key,
    )
    job = await parts.database.read(reads.job_by_id, request.principal.user_id, job_id, or_deleted=True)
    if job is None:
        raise NotFound("The job is gone.")
    await parts.live.add([job])
    return job


def answer(request: AppRequest, job: Job, telling: Telling, *, streams: bool) -> Response[Any]:
    left = request.parts.calls.leave
    if streams:
        return stream_answer(request, job, telling, left)
    return WholeAnswer(request, job, telling, left)


def _is_repeat(request: AppRequest) -> bool:
    return request.headers.get(REPEATS, "0").strip() not in ("", "0")


async def _digest(request: AppRequest) -> str:
    path = request.scope["path"].removeprefix("/chat")
    digest = hashlib.sha256(f"{request.principal.user_id}\0{path}\0".encode())
    digest.update(await request.body())
    return digest.hexdigest()
