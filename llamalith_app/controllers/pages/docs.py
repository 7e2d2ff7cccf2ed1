"""The API's reference as a page, made from its OpenAPI document: no script, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

from litestar import Controller, get
from litestar.response import Template

from llamalith_app.guards.principal import PAGE
from llamalith_app.web.html import page
from llamalith_app.web.openapi import EVENTS, REF, STREAM, document
from llamalith_app.web.request import AppRequest

LARGEST_SHOWN_LIMIT = 1e12
"""Larger limits only keep out nonsense, and are not shown."""


class Field(NamedTuple):
    name: str
    type: str
    """In words."""
    required: bool
    description: str


class Operation(NamedTuple):
    tag: str
    method: str
    path: str
    summary: str
    description: str
    parameters: list[Field]
    body: list[Field]
    answer: list[Field]
    answer_status: str
    refusals: list[Field]


class DocsPage(Controller):
    path = "/docs"
    include_in_schema = False

    @get("/", opt=PAGE)
    async def reference(self, request: AppRequest) -> Template:
        openapi = document(request.app)
        found = sorted(operations(openapi), key=lambda operation: operation.tag)
        origin = request.parts.hosts.origin(request.scope["scheme"], request.headers.get("host", ""))
        groups = {tag: list(group) for tag, group in groupby(found, key=lambda operation: operation.tag)}
        return page(request, "docs", groups=groups, shapes=shapes(openapi), origin=origin)

    @get("/openapi.json", opt=PAGE)
    async def for_machines(self, request: AppRequest) -> dict[str, Any]:
        """The same as /api/openapi.json, for those who see /chat alone."""
        return document(request.app) | {"servers": [{"url": "/chat"}]}


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
        tag=next(iter(operation.get("tags", [])), ""),
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
            )
            for parameter in operation.get("parameters", [])
        ],
        body=_fields(operation.get("requestBody", {}), schemas),
        answer=_fields(answer, schemas),
        answer_status=status,
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
        Field(name, _in_words(field), name in required, _description(field))
        for name, field in schema.get("properties", {}).items()
    ]


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
        return f"list of {_in_words(schema.get('items', {}))}"
    limits = [
        f"{words} {schema[name]:,}"
        for name, words in (
            ("minimum", "from"),
            ("exclusiveMinimum", "more than"),
            ("maximum", "to"),
            ("maxLength", "at most, characters:"),
        )
        if name in schema and abs(schema[name]) < LARGEST_SHOWN_LIMIT
    ]
    return " ".join([str(schema.get("format", kind)), *limits])
