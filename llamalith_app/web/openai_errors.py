"""Errors as OpenAI clients read them. Pure: knows no route and no framework.

Their SDKs send a request again that was answered 408, 409, 429 or 5xx. So a job that ended is never told by one of
these.
"""

from __future__ import annotations

import re
from http import HTTPStatus

from llamalith_app.contracts.jobs import SAME_AGAIN_KINDS, Job
from llamalith_app.contracts.openai import OpenAIError, OpenAIErrorBody

PLACE = re.compile(r"([A-Za-z_][\w.\[\]-]*): ")
"""Error texts begin with the field that they are about."""
CODES = {"not-authenticated": "invalid_api_key", "model-not-found": "model_not_found"}
"""By the word of one of our errors; others have the word as their code."""
TOO_LONG = "context_length_exceeded"
FINAL = HTTPStatus.BAD_REQUEST


def body(status: int, word: str, message: str, *, code: str | None = None) -> OpenAIErrorBody:
    """`word`: that of the problem's type."""
    place = PLACE.match(message) if status in (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND) else None
    return OpenAIErrorBody(
        error=OpenAIError(
            message=message,
            type=_type(status),
            param=None if place is None else place[1],
            code=code or CODES.get(word, word.replace("-", "_")),
        )
    )


def of_job(job: Job) -> OpenAIErrorBody:
    """Why a job ended without a reply."""
    if job.error is None:
        error = OpenAIError(
            message="The job was cancelled.", type="invalid_request_error", param=None, code="cancelled"
        )
        return OpenAIErrorBody(error=error)
    is_request = job.error.kind in SAME_AGAIN_KINDS
    too_long = job.error.kind == "context_overflow"
    return OpenAIErrorBody(
        error=OpenAIError(
            message=job.error.reason,
            type="invalid_request_error" if is_request else "server_error",
            param="messages" if too_long else None,
            code=TOO_LONG if too_long else job.error.kind,
        )
    )


def _type(status: int) -> str:
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return "server_error"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    if status == HTTPStatus.FORBIDDEN:
        return "permission_error"
    return "invalid_request_error"
