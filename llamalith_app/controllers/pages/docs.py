"""The API's reference as a page, made from its OpenAPI document: no script, nothing from elsewhere.

Groups the operations by what people do with them, and shows of each field what it may be and an example.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from litestar import Controller, get
from litestar.response import Template

from llamalith_app.contracts import examples
from llamalith_app.contracts.parameters import NAMES as PARAMETERS
from llamalith_app.guards.principal import PAGE
from llamalith_app.web import curl
from llamalith_app.web.html import page
from llamalith_app.web.openapi import EVENTS, REF, STREAM, document
from llamalith_app.web.request import AppRequest

LARGEST_SHOWN_LIMIT = 1e12
"""Larger limits only keep out nonsense, and are not shown."""
MAX_EXAMPLE_CHARS = 160
NO_EXAMPLE = object()


class Field(NamedTuple):
    name: str
    type: str
    """In words, with its limits."""
    required: bool
    description: str
    example: str = ""
    """As JSON; empty: there is none."""
    default: str = ""
    """The same, where the field may be absent and is not null then."""


class Operation(NamedTuple):
    anchor: str
    """Its place on the page."""
    method: str
    path: str
    summary: str
    description: str
    parameters: list[Field]
    body: list[Field]
    answer: list[Field]
    answer_status: str
    answer_type: str
    """The name of the answer's shape; empty: it is none, or one of several."""
    refusals: list[Field]
    command: str = ""
    """As one types it."""


class Group(NamedTuple):
    title: str
    words: str
    """What one does with them."""
    operations: list[Operation]


GROUPS = {
    "Send": "Queue a prompt. The answer comes at once; the reply is made when it is its turn.",
    "Follow": "See how far a job is, and get its text while it is written.",
    "Conversations": "Read what was said, and change it.",
    "Manage": "Find jobs, cancel them, try them again, change their class.",
    "Models": "See which models there are, and load them.",
    "OpenAI": "What OpenAI clients call. Each call is a job as every other; an error has OpenAI's shape.",
    "Health": "For probes. These two need no token.",
}
_PLACES = (
    ("Health", re.compile(r"/(?:healthz|readyz)")),
    ("OpenAI", re.compile(r".* /v1/.*")),
    ("Models", re.compile(r".* /api/models.*")),
    ("Send", re.compile(r"POST (?:/api/jobs|/api/submit|.*/reply|.*/regenerate)")),
    ("Manage", re.compile(r".*/answer-now")),
    ("Follow", re.compile(r"GET (?:.*/events|/api/jobs/\{job_id\}(?:/attempts)?|.*/latest|/api/status/.*)")),
    ("Conversations", re.compile(r".* /api/conversations.*")),
    ("Manage", re.compile(r".*")),
)


class DocsPage(Controller):
    path = "/docs"
    include_in_schema = False

    @get("/", opt=PAGE)
    async def reference(self, request: AppRequest) -> Template:
        openapi = document(request.app)
        origin = request.parts.hosts.origin(request.scope["scheme"], request.headers.get("host", ""))
        return page(request, "docs", groups=groups(openapi, origin), shapes=shapes(openapi), origin=origin)

    @get("/openapi.json", opt=PAGE)
    async def for_machines(self, request: AppRequest) -> dict[str, Any]:
        """The same as /api/openapi.json, for those who see /chat alone."""
        return document(request.app) | {"servers": [{"url": "/chat"}]}


def groups(document: dict[str, Any], origin: str) -> list[Group]:
    """Every operation, in the order of GROUPS and in each of the document. `origin`: where commands go."""
    found: dict[str, list[Operation]] = {title: [] for title in GROUPS}
    for operation in operations(document):
        described = document["paths"][operation.path][operation.method.lower()]
        found[group_of(operation)].append(operation._replace(command=_command(operation, described, origin)))
    return [Group(title, GROUPS[title], some) for title, some in found.items() if some]


def group_of(operation: Operation) -> str:
    at = f"{operation.method} {operation.path}"
    return next(title for title, pattern in _PLACES if pattern.fullmatch(at) or pattern.fullmatch(operation.path))


def _command(operation: Operation, described: dict[str, Any], origin: str) -> str:
    """With examples in path and query, and a body where one is needed."""
    path, asked = operation.path, {}
    for parameter in described.get("parameters", []):
        example = examples.IN_ADDRESSES.get(parameter["name"], "x")
        if parameter["in"] == "path":
            path = path.replace(f"{{{parameter['name']}}}", quote(str(example), safe=""))
        elif parameter["in"] == "query" and parameter.get("required"):
            asked[parameter["name"]] = _allowed(parameter["schema"], example)
    shape = described.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    body = examples.request_body(shape["$ref"].removeprefix(REF)) if "$ref" in shape else None
    is_stream = STREAM in described["responses"].get(operation.answer_status, {}).get("content", {})
    # Where a proxy passes on the pages alone, the API stands under them as well.
    url = f"{origin}{'/chat' if path.startswith('/api/') else ''}{path}{'?' if asked else ''}{urlencode(asked)}"
    return curl.command(operation.method, url, body, is_stream=is_stream)


def _allowed(schema: dict[str, Any], example: Any) -> Any:
    """The example, or the first of the words that are allowed."""
    words = schema.get("items", schema).get("enum")
    return example if not words or example in words else words[0]


def operations(document: dict[str, Any]) -> list[Operation]:
    """Every operation of the document, in its order."""
    schemas = document["components"]["schemas"]
    return [
        _operation(path, method, operation, schemas)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def shapes(document: dict[str, Any]) -> dict[str, list[Field]]:
    """The shapes that fields of others and events have, by name."""
    schemas = document["components"]["schemas"]
    inner = {name for schema in schemas.values() for field in schema["properties"].values() for name in _names(field)}
    for operation in operations(document):
        inner.update(field.type for field in operation.answer if field.type in schemas)
        inner.update(field.type for field in operation.refusals)
        inner.update({operation.answer_type} & set(schemas))
    return {name: _schema_fields(schemas[name], schemas) for name in sorted(inner)}


def _names(schema: dict[str, Any]) -> Iterator[str]:
    """Of the schemas that this one refers to."""
    if "$ref" in schema:
        yield schema["$ref"].removeprefix(REF)
    for inner in (*schema.get("oneOf", []), *schema.get("anyOf", []), schema.get("items", {})):
        yield from _names(inner) if inner else ()


def _operation(path: str, method: str, operation: dict[str, Any], schemas: dict[str, Any]) -> Operation:
    status, answer = next(iter(operation["responses"].items()))
    return Operation(
        anchor=re.sub(r"[^a-z]+", "-", f"{method} {path}").strip("-"),
        method=method.upper(),
        path=path,
        summary=operation.get("summary", ""),
        description=operation.get("description", ""),
        parameters=[
            Field(
                parameter["name"],
                _in_words(parameter["schema"]),
                parameter.get("required", False),
                _description(parameter),
                _as_json(_allowed(parameter["schema"], examples.IN_ADDRESSES.get(parameter["name"], NO_EXAMPLE))),
            )
            for parameter in operation.get("parameters", [])
        ],
        # What people send most stands first; the parameters that every request shares come before it in the shape.
        body=sorted(_fields(operation.get("requestBody", {}), schemas), key=lambda field: field.name in PARAMETERS),
        answer=_fields(answer, schemas),
        answer_status=status,
        answer_type=next(_names(answer.get("content", {}).get("application/json", {}).get("schema", {})), ""),
        refusals=[
            Field(status, "Problem", False, refusal["description"])
            for status, refusal in operation["responses"].items()
            if status >= "400"
        ],
    )


def _fields(content: dict[str, Any], schemas: dict[str, Any]) -> list[Field]:
    by_type = content.get("content", {})
    if STREAM in by_type:
        return _events(by_type[STREAM][EVENTS], schemas)
    return _schema_fields(by_type.get("application/json", {}).get("schema", {}), schemas)


def _events(events: dict[str, Any], schemas: dict[str, Any]) -> list[Field]:
    """A field for each kind of event: the shape of its data, and that shape's description."""
    return [
        Field(event, shape, False, schemas[shape].get("description", ""))
        for event, data in events.items()
        for shape in _names(data)
    ]


def _schema_fields(schema: dict[str, Any], schemas: dict[str, Any]) -> list[Field]:
    if "properties" not in schema and "anyOf" in schema:
        schema = schema["anyOf"][0]
    schema = schemas[schema["$ref"].removeprefix(REF)] if "$ref" in schema else schema
    required = schema.get("required", [])
    return [
        Field(
            name,
            _in_words(field),
            name in required,
            _description(field),
            _as_json(next(iter(field.get("examples", [])), _derived_example(field, schemas))),
            "" if field.get("default") in (None, "") else _as_json(field["default"]),
        )
        for name, field in schema.get("properties", {}).items()
    ]


def _derived_example(schema: dict[str, Any], schemas: dict[str, Any]) -> Any:
    """A value that the schema allows, where the contracts have no example."""
    if "$ref" in schema:
        shape = schemas[schema["$ref"].removeprefix(REF)]
        return {
            name: value
            for name, field in shape.get("properties", {}).items()
            if (value := next(iter(field.get("examples", [])), None)) is not None
        }
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return _derived_example(schema[several][0], schemas)
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "boolean":
            return True
        case "integer" | "number":
            return max(schema.get("minimum", 1), 1)
        case "array":
            return [_derived_example(schema.get("items", {}), schemas)]
        case "string" if schema.get("format") == "date-time":
            return "2026-11-30T09:15:02Z"
        case "string":
            return "text"
        case _:
            return NO_EXAMPLE


def _as_json(value: Any) -> str:
    if value is NO_EXAMPLE:
        return ""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_EXAMPLE_CHARS else f"{text[: MAX_EXAMPLE_CHARS - 1]}…"


def _description(schema: dict[str, Any]) -> str:
    """Of the field, or of the first of the shapes that it may have."""
    alternatives = schema.get("anyOf", [])
    return str(schema.get("description") or next(filter(None, map(_description, alternatives)), ""))


def _in_words(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"].removeprefix(REF))
    for several in ("oneOf", "anyOf"):
        if several in schema:
            return " or ".join(_in_words(one) for one in schema[several])
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    kind = str(schema.get("type", "any"))
    if kind == "array":
        most = f", at most {schema['maxItems']:,}" if "maxItems" in schema else ""
        return f"list of {_in_words(schema.get('items', {}))}{most}"
    if kind == "string" and "format" not in schema:
        return f"text{_length_in_words(schema)}"
    limits = [
        f"{words} {schema[name]:,}"
        for name, words in (
            ("minimum", "from"),
            ("exclusiveMinimum", "more than"),
            ("maximum", "to"),
            ("exclusiveMaximum", "less than"),
        )
        if name in schema and abs(schema[name]) < LARGEST_SHOWN_LIMIT
    ]
    return " ".join([str(schema.get("format", kind)), *limits])


def _length_in_words(schema: dict[str, Any]) -> str:
    least, most = schema.get("minLength"), schema.get("maxLength")
    if most is None:
        return "" if least is None else f" of at least {least:,} characters"
    return f" of at most {most:,} characters" if least is None else f" of {least:,} to {most:,} characters"
