"""The OpenAPI document: Litestar's routes with msgspec's shapes.

Litestar drops limits of lists, unions and 0, and writes ids as floating-point numbers; msgspec describes its types
exactly. Owns what neither knows: the events of a stream, which fields a request needs together, and what the docstrings
and examples of the contracts say of each field.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from itertools import pairwise
from typing import Any

import msgspec
from litestar import Litestar, Request
from litestar.openapi.plugins import JsonRenderPlugin

from llamalith_app.contracts import (
    conversation_list,
    conversations,
    events,
    examples,
    export,
    health,
    jobs,
    models,
    openai,
    parameters,
    problems,
    responses,
)
from llamalith_app.contracts.text import END

REF = "#/components/schemas/"
STREAM = "text/event-stream"
EVENTS = "x-events"
"""Beside a stream's schema: the shape of each event's data, by the event's name."""
MAX_ID = 2**63 - 1

_MODULES = (
    conversation_list,
    conversations,
    events,
    export,
    health,
    jobs,
    models,
    openai,
    parameters,
    problems,
    responses,
)
_SHAPES = {
    name: shape
    for module in _MODULES
    for name, shape in vars(module).items()
    if isinstance(shape, type) and issubclass(shape, msgspec.Struct)
}
_EVENT_SHAPES = {
    "progress": events.ProgressEvent,
    "delta": events.Delta,
    "thinking": events.Thinking,
    "restart": events.Restart,
    "done": jobs.Job,
    "error": jobs.Job,
    "cancelled": jobs.Job,
}
_NOT_BLANK = {"type": "string", "pattern": r"\S"}
_BLANK = {"pattern": rf"^\s*{END}"}


class ExactDocument(JsonRenderPlugin):
    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:  # noqa: ARG002
        return super().render(request, document(request.app))


@cache
def document(app: Litestar) -> dict[str, Any]:
    """The OpenAPI document of all routes that are not left out of it, as plain JSON values, not to be changed. Takes a
    tenth of a second the first time."""
    described = app.openapi_schema.to_schema()
    shapes = [_SHAPES[name] for name in described["components"]["schemas"]]
    _, schemas = msgspec.json.schema_components(shapes, ref_template=REF + "{name}")
    schemas["JobCreate"]["anyOf"] = [
        {"required": ["content"], "properties": {"content": _NOT_BLANK}},
        {"required": ["system_prompt"], "properties": {"system_prompt": _NOT_BLANK, "assistant_context": _BLANK}},
    ]
    schemas["JobChange"]["anyOf"] = [
        {"required": [name], "properties": {name: {"type": "string"}}} for name in ("content", "priority")
    ]
    for name, schema in schemas.items():
        _describe_fields(_SHAPES[name], schema)
    described["components"]["schemas"] = schemas
    for methods in described["paths"].values():
        for operation in methods.values():
            for parameter in operation.get("parameters", []):
                parameter["schema"] = _parameter_schema(parameter["schema"])
            for answer in operation["responses"].values():
                for content in answer.get("content", {}).values():
                    if "oneOf" in content["schema"]:
                        # One shape may have all fields of the other.
                        content["schema"]["anyOf"] = content["schema"].pop("oneOf")
                if STREAM in answer.get("content", {}):
                    answer["content"][STREAM] = {
                        "schema": {"type": "string"},
                        EVENTS: {name: {"$ref": REF + shape.__name__} for name, shape in _EVENT_SHAPES.items()},
                    }
    return described


def _describe_fields(shape: type[msgspec.Struct], schema: dict[str, Any]) -> None:
    """Adds to each field what its docstring says, and an example."""
    docs, found = _field_docs(shape), examples.of_fields(shape.__name__)
    for name, field in schema.get("properties", {}).items():
        if name in docs:
            field.setdefault("description", docs[name])
        if name in found:
            field["examples"] = [found[name]]


@cache
def _field_docs(shape: type[msgspec.Struct]) -> dict[str, str]:
    """The docstrings below the fields of a shape and of those that it extends, each on one line."""
    docs: dict[str, str] = {}
    for base in reversed(shape.__mro__[: shape.__mro__.index(msgspec.Struct)]):
        statements = next(ast.iter_child_nodes(ast.parse(textwrap.dedent(inspect.getsource(base))))).body  # type: ignore[attr-defined]
        for field, below in pairwise(statements):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                match below:
                    case ast.Expr(ast.Constant(str(text))):
                        docs[field.target.id] = " ".join(text.split())
    return docs


def _parameter_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """There is no null in a path, a query or a header: what may be null may be absent."""
    exact = {name: _whole_number(value) for name, value in schema.items() if name != "oneOf"}
    for one in schema.get("oneOf", []):
        if one != {"type": "null"}:
            exact |= one
    return exact


def _whole_number(value: Any) -> Any:
    return min(int(value), MAX_ID) if isinstance(value, float) and value.is_integer() else value
