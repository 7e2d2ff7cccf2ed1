"""From an error to its answer: problem details with a stable type, never a traceback and never what was sent."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

import structlog
from litestar import MediaType, Request, Response
from litestar.exceptions import HTTPException, ValidationException

from llamalith_app.contracts import parameters
from llamalith_app.contracts.problems import Problem
from llamalith_app.errors import BadInput, LlamalithError

log = structlog.get_logger(__name__)

ALLOWED = {
    "limit": "expected a whole number from 1 to 500",
    "before": "expected a job's id, a whole number of at least 1",
    "idempotency_key": "expected 1 to 255 visible ASCII characters",
    "job_id": "expected a job's id, a whole number of at least 1",
    **parameters.allowed(),
}
"""What would be right, for parameters of which msgspec tells half."""

HEADERS = {"idempotency_key": "Idempotency-Key"}
"""What clients call what handlers call so."""

PROBLEM_JSON = "application/problem+json"


def of_ours(request: Request[Any, Any, Any], error: LlamalithError) -> Response[Problem]:
    headers = {}
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = "GET"
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    return _answer(request, error.status, error.type, error.title, str(error), headers)


def of_litestar(request: Request[Any, Any, Any], error: HTTPException) -> Response[Problem]:
    status = HTTPStatus(error.status_code)
    if isinstance(error, ValidationException):
        return _answer(request, 400, BadInput.type, BadInput.title, _what_is_wrong(error), {})
    if error.detail == "client disconnected prematurely":
        return _answer(request, 400, BadInput.type, BadInput.title, "The body ended before its length.", {})
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return of_anything(request, error)
    word = status.phrase.lower().replace(" ", "-")
    headers = {name: value for name, value in (error.headers or {}).items() if name.lower() == "allow"}
    details = {
        404: f"There is nothing at {request.scope['path'][:200]}.",
        405: f"{request.method} is not possible here; {headers.get('allow', 'nothing')} is.",
        413: "The body is too large: at most 16 MiB.",
    }
    return _answer(request, status, word, status.phrase, details.get(status, error.detail), headers)


def of_anything(request: Request[Any, Any, Any], error: Exception) -> Response[Problem]:
    log.error("request failed", exc_info=error)
    return _answer(
        request,
        500,
        "internal",
        "Internal error",
        "Something went wrong here; the log has more under this request id.",
        {},
    )


def _answer(
    request: Request[Any, Any, Any],
    status: int,
    word: str,
    title: str,
    detail: str,
    headers: dict[str, str],
) -> Response[Problem]:
    return Response(
        Problem(
            type=f"about:llamalith/{word}",
            title=title,
            status=status,
            detail=detail,
            request_id=request.scope.get("request_id", ""),  # type: ignore[arg-type]
            error=detail if status == HTTPStatus.BAD_REQUEST else None,
        ),
        status_code=status,
        headers=headers,
        # The original's callers know a 401 as plain JSON.
        media_type=MediaType.JSON if status == HTTPStatus.UNAUTHORIZED else PROBLEM_JSON,
    )


def _what_is_wrong(error: ValidationException) -> str:
    """msgspec's sentence about the first field that is wrong, with the field's name before it."""
    extra = error.extra if isinstance(error.extra, list) else []
    first: dict[str, Any] = extra[0] if extra and isinstance(extra[0], dict) else {}
    message = in_words(str(first.get("message", error.detail)))
    where = str(first.get("key", ""))
    if message == "'data'":
        return "The body is empty: expected a JSON object"
    # A place in a list is told by what the list may hold.
    message = ALLOWED.get(where.partition("[")[0], message)
    where = HEADERS.get(where, where)
    if where in ("", "data"):
        return f"The body is wrong: {message}" if where else message
    return f"{where}: {message}"


def in_words(message: str) -> str:
    """A sentence of msgspec, for people who have never seen a regular expression."""
    return re.sub(
        r"Expected `str` matching regex .*?(?= - at|$)",
        "has characters that are not allowed here (NUL, or control characters in an id or a name)",
        message,
    )
