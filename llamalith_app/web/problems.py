"""From an error to its answer: problem details with a stable type, never a traceback and never what was sent. And what
the OpenAPI document tells of them."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

import structlog
from litestar import MediaType, Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.plugins import ReceiveRoutePlugin
from litestar.routes import BaseRoute, HTTPRoute

from llamalith_app.contracts import parameters
from llamalith_app.contracts.problems import Problem
from llamalith_app.errors import BadInput, LlamalithError
from llamalith_app.web.paths import unmarked

log = structlog.get_logger(__name__)

AN_ID = "expected 1 to 200 characters that are not all blank, without control characters; or a whole number"

ALLOWED = {
    "limit": "expected a whole number from 1 to 500",
    "conversation_id": AN_ID,
    "session_id": AN_ID,
    "before": "expected a job's id, a whole number of at least 1",
    "idempotency_key": "expected 1 to 255 visible ASCII characters",
    "texts": "expected true or false",
    "job_id": "expected a job's id, a whole number of at least 1",
    "priority": "expected one of interactive, normal, batch",
    "status": "expected queued or processing for a cancel, error or cancelled for a retry; both may stand",
    "timeout_s": "expected seconds, more than 0 and at most 604800",
    "queue_timeout_s": "expected seconds, more than 0 and at most 604800",
    "max_attempts": "expected a whole number from 1 to 100",
    **parameters.allowed(),
}
"""What would be right, for fields of which msgspec tells half."""

TAKES_UNKNOWN = {"takes_unknown": True}
"""Options of a route that answers 200 for a conversation that is not there."""

HEADERS = {"idempotency_key": "Idempotency-Key"}
"""What clients call what handlers call so."""

KINDS = {
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "a boolean",
    "object": "an object",
    "array": "a list",
}
"""msgspec's names of JSON's types, which are Python's, in words."""
UNITS = {"str": "characters"}
SIGNS = {">=": "of at least", "<=": "of at most", ">": "above", "<": "below"}
MISMATCH = re.compile(r"Expected `([^`]+)`, got `(\w+)`")
LENGTH = re.compile(r"Expected `(\w+)` of length (>=|<=) (\d+)")
RANGE = re.compile(r"Expected `(\w+)` (>=|<=|>|<) (\S+)")
ABSENT_FIELD = re.compile(r"Object missing required field `(\w+)`")
ABSENT_PARAMETER = re.compile(r"Missing required \w+ parameter '([\w-]+)'")

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
        404: f"There is nothing at {unmarked(request.scope['path'])[:200]}.",
        405: f"{request.method} is not possible here; {headers.get('allow', 'nothing')} is.",
        413: f"The body is too large: {_most_body(request)}.",
    }
    return _answer(request, status, word, status.phrase, details.get(status, error.detail), headers)


def _most_body(request: Request[Any, Any, Any]) -> str:
    """What a body may have where this one was sent."""
    handler = request.scope.get("route_handler")
    most = handler.resolve_request_max_body_size() if isinstance(handler, HTTPRouteHandler) else None
    if most is None:
        return "less is taken here"
    return f"at most {most // 2**20} MiB" if most >= 2**20 else f"at most {most // 2**10} KiB before a login"


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


class InDocument(ReceiveRoutePlugin):
    """Adds to each route that the OpenAPI document describes what it may refuse, which follows from what it takes."""

    def receive_route(self, route: BaseRoute) -> None:
        if isinstance(route, HTTPRoute):
            for handler in route.route_handlers:
                if not handler.opt.get("open"):
                    handler.responses = {**_refusals(handler, route), **(handler.responses or {})}


def _refusals(handler: HTTPRouteHandler, route: HTTPRoute) -> dict[int, ResponseSpec]:
    takes = handler.parsed_fn_signature.parameters.keys() - {"request"}
    told = {401: "No token and no session, or a wrong one."}
    if takes:
        told[400] = "What was sent is wrong: `detail` says what, where, and what would be right. Nothing was stored."
    if handler.http_methods != {"GET"}:
        told[403] = "Another site sent it, with the cookie of a session; or that session's CSRF token is missing."
    if route.path_parameters and not handler.opt.get("takes_unknown"):
        told[404] = "There is no such job or conversation of this caller."
    if "data" in takes:
        told |= {
            413: "The body is larger than 16 MiB.",
            415: "The body is not `application/json` in UTF-8, or is compressed.",
        }
    if "idempotency_key" in takes:
        told |= {
            409: "The Idempotency-Key stands for another request, or the job did not end as `error` or `cancelled`.",
            429: "The queue is full; Retry-After says when to come again.",
        }
    told[431] = "The headers are larger than 32 KiB together."
    told[503] = "The record cannot be used now and nothing was stored; Retry-After says when to come again."
    return {
        status: ResponseSpec(
            Problem,
            description=description,
            media_type=MediaType.JSON if status == HTTPStatus.UNAUTHORIZED else PROBLEM_JSON,
            generate_examples=False,
        )
        for status, description in sorted(told.items())
    }


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
    message = str(first.get("message", error.detail))
    where = str(first.get("key", ""))
    if absent := ABSENT_PARAMETER.match(message):
        where, message = absent[1], "missing"
    elif message == "'data'":
        return "The body is empty: expected a JSON object"
    return in_words(message, "" if where == "data" else where)


def in_words(message: str, where: str = "") -> str:
    """A sentence of msgspec in words of JSON, with the place that it speaks of before it; empty: the whole body. Names
    nothing that was sent."""
    sentence, _, place = message.partition(" - at `")
    where = where or place.removeprefix("$").removeprefix(".").rstrip("`")
    if absent := ABSENT_FIELD.fullmatch(sentence):
        where, sentence = f"{where}.{absent[1]}".lstrip("."), "missing"
    # A place in a list is told by what the list may hold.
    allowed = ALLOWED.get(where.partition("[")[0])
    told = allowed or _of_type(sentence)
    if allowed and sentence == "missing":
        told = f"missing; {allowed}"
    where = HEADERS.get(where, where)
    return f"{where}: {told}" if where else f"The body is wrong: {told}"


def _of_type(sentence: str) -> str:
    if "matching regex" in sentence:
        return "has characters that are not allowed here (NUL, or control characters in an id or a name)"
    if limit := LENGTH.fullmatch(sentence):
        kind, sign, n = limit.groups()
        unit = UNITS.get(kind, "entry" if n == "1" else "entries")
        return f"expected {KINDS[kind]} of at {'least' if sign == '>=' else 'most'} {n} {unit}"
    if limit := RANGE.fullmatch(sentence):
        kind, sign, n = limit.groups()
        return f"expected {KINDS[kind]} {SIGNS[sign]} {n}"
    if mismatch := MISMATCH.fullmatch(sentence):
        wanted, found = mismatch.groups()
        return f"expected {_either(wanted.split(' | '))}, got {_found(found, wanted)}"
    if sentence.startswith("Invalid"):
        return "expected another value: this one is not among those that are possible"
    return sentence.replace("`", "")


def _either(kinds: list[str]) -> str:
    """`null` last, as an afterthought."""
    *others, last = dict.fromkeys(KINDS.get(kind, kind) for kind in sorted(kinds, key="null".__eq__))
    return f"{', '.join(others)} or {last}" if others else last


def _found(kind: str, wanted: str) -> str:
    if kind == "float" and "float" not in wanted and "int" in wanted:
        return "a number with a fraction"
    return "a number" if kind == "int" else KINDS.get(kind, kind)
