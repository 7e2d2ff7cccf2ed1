"""Turns an error into its answer: problem details with a stable type, without a traceback and without what was sent.
Describes these answers in the OpenAPI document, too.

Error texts name the limits that the types of fields and parameters have. Knows no field and no limit itself.
"""

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

from llamalith_app.contracts.openai import OpenAIErrorBody
from llamalith_app.contracts.problems import Problem
from llamalith_app.errors import BadInput, LlamalithError
from llamalith_app.settings import ranges
from llamalith_app.web import openai_errors
from llamalith_app.web.envelope import MAX_HEADER_BYTES
from llamalith_app.web.paths import is_openai, unmarked

log = structlog.get_logger(__name__)

TAKES_UNKNOWN = {"takes_unknown": True}
"""Options of a route that answers 200 for a conversation that is not there."""

NAMES_MODEL = {"names_model": True}
"""Options of a route whose body names a model that may not be there."""

KINDS = {
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "a boolean",
    "object": "an object",
    "array": "a list",
}
"""msgspec's names of JSON's types, which are Python's, in words."""
MISMATCH = re.compile(r"Expected `([^`]+)`, got `(\w+)`")
LENGTH = re.compile(r"Expected `(\w+)` of length (>=|<=) (\d+)")
ABSENT_FIELD = re.compile(r"Object missing required field `(\w+)`")
ABSENT_PARAMETER = re.compile(r"Missing required \w+ parameter '([\w-]+)'")

KIB, MIB = 2**10, 2**20
PROBLEM_JSON = "application/problem+json"


def from_own_error(request: Request[Any, Any, Any], error: LlamalithError) -> Response[Any]:
    headers = {}
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = "GET"
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    return _answer(request, error.status, error.type, error.title, str(error), headers)


def from_litestar_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    status = HTTPStatus(error.status_code)
    if isinstance(error, ValidationException):
        return _answer(request, 400, BadInput.type, BadInput.title, _invalid(request, error), {})
    if error.detail == "client disconnected prematurely":
        return _answer(request, 400, BadInput.type, BadInput.title, "The body ended before its length.", {})
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return from_unexpected_error(request, error)
    word = status.phrase.lower().replace(" ", "-")
    headers = {name: value for name, value in (error.headers or {}).items() if name.lower() == "allow"}
    details = {
        404: f"There is nothing at {unmarked(request.scope['path'])[:200]}.",
        405: f"{request.method} is not possible here; {headers.get('allow', 'nothing')} is.",
        413: f"The body is too large: {_most_body(request)}.",
    }
    return _answer(request, status, word, status.phrase, details.get(status, error.detail), headers)


def _most_body(request: Request[Any, Any, Any]) -> str:
    """How large a body may be where this one was sent."""
    handler = request.scope.get("route_handler")
    most = handler.resolve_request_max_body_size() if isinstance(handler, HTTPRouteHandler) else None
    if most is None:
        return "less is taken here"
    return f"at most {_size(most)}{'' if most >= MIB else ' before a login'}"


def _size(n_bytes: int) -> str:
    return f"{n_bytes // MIB} MiB" if n_bytes >= MIB else f"{n_bytes // KIB} KiB"


def from_unexpected_error(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
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
    refusals = {401: "No token and no session, or a wrong one."}
    if takes:
        refusals[400] = (
            "What was sent is wrong: `detail` says what, where, and what would be right. Nothing was stored."
        )
    if handler.http_methods != {"GET"}:
        refusals[403] = "Another site sent it, with the cookie of a session; or that session's CSRF token is missing."
    if route.path_parameters and not handler.opt.get("takes_unknown"):
        refusals[404] = "There is no such job, conversation or turn of this caller."
    if handler.opt.get("names_model"):
        refusals[404] = "There is no such model."
    if "data" in takes:
        refusals |= {
            413: f"The body is larger than {_size(handler.resolve_request_max_body_size() or 0)}.",
            415: "The body is not `application/json` in UTF-8, or is compressed.",
        }
    if "idempotency_key" in takes:
        refusals |= {
            409: "The Idempotency-Key stands for another request, or the job did not end as `error` or `cancelled`.",
            429: "The queue is full; Retry-After says when to come again.",
        }
    if handler.opt.get("makes_no_job"):
        refusals.pop(429, None)
    if conflict := handler.opt.get("conflict"):
        refusals[409] = conflict
    refusals[431] = f"The headers are larger than {_size(MAX_HEADER_BYTES)} together."
    refusals[503] = "The record cannot be used now and nothing was stored; Retry-After says when to come again."
    of_openai = is_openai(route.path)
    return {
        status: ResponseSpec(
            OpenAIErrorBody if of_openai else Problem,
            description=description,
            media_type=MediaType.JSON if of_openai or status == HTTPStatus.UNAUTHORIZED else PROBLEM_JSON,
            generate_examples=False,
        )
        for status, description in sorted(refusals.items())
    }


def _answer(
    request: Request[Any, Any, Any],
    status: int,
    word: str,
    title: str,
    detail: str,
    headers: dict[str, str],
) -> Response[Any]:
    # `web/request_log.py` logs it.
    request.scope["problem"] = word  # type: ignore[typeddict-unknown-key]
    if is_openai(request.scope["path"]):
        return Response(openai_errors.body(status, word, detail), status_code=status, headers=headers)
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


def _invalid(request: Request[Any, Any, Any], error: ValidationException) -> str:
    """What is wrong with the first field that is: its name, and what would be right."""
    extra = error.extra if isinstance(error.extra, list) else []
    first: dict[str, Any] = extra[0] if extra and isinstance(extra[0], dict) else {}
    message, place = str(first.get("message", error.detail)), str(first.get("key", ""))
    handler = request.scope.get("route_handler")
    root: Any = handler.signature_model if isinstance(handler, HTTPRouteHandler) else None
    if message == "'data'":
        return "The body is empty: expected a JSON object"
    if absent := ABSENT_PARAMETER.match(message):
        return explained(f"Object missing required field `{absent[1]}`", root)
    if place == "data" or first.get("source") == "body":
        return explained(message, ranges.type_at(root, "data"), "" if place == "data" else place)
    return explained(message, root, place)


def explained(message: str, root: Any, place: str = "") -> str:
    """One of msgspec's messages in words of JSON, after the place that it is about (empty: the whole). The limits are
    those of the field's type, which is looked up in the struct `root`. Contains nothing of what was sent."""
    sentence, _, found = message.partition(" - at `")
    place = place or found.removeprefix("$").removeprefix(".").rstrip("`")
    absent = ABSENT_FIELD.fullmatch(sentence)
    if absent:
        place = f"{place}.{absent[1]}".lstrip(".")
    wanted = ranges.type_at(root, place)
    expected = f"expected {ranges.in_words(wanted)}" if wanted and ranges.describes_itself(wanted) else ""
    reason = "; ".join(filter(None, ["missing" if absent else "", expected])) or _reason(sentence)
    return f"{_client_name(wanted) or place}: {reason}" if place else f"The body is wrong: {reason}"


def _client_name(wanted: Any) -> str:
    """The name that clients have for a parameter whose handler calls it otherwise, such as a header's; else nothing."""
    names = [ranges.marked(member, "name") for member in ranges.members(wanted)]
    return next((str(name) for name in names if name), "")


def _reason(sentence: str) -> str:
    if "matching regex" in sentence:
        return "has characters that are not allowed here (NUL, or control characters in an id or a name)"
    if limit := LENGTH.fullmatch(sentence):
        kind, sign, n = limit.groups()
        one, many = ("character", "characters") if kind == "str" else ("entry", "entries")
        unit = one if n == "1" else many
        return f"expected {KINDS[kind]} of at {'least' if sign == '>=' else 'most'} {n} {unit}"
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
