"""How one job's reply is drawn and what it is held to: over the model's settings, which stand over the defaults.

The names are OpenAI's and llama.cpp's; the limits those of `config.json` (`ranges.py`).
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from llamalith_app import ranges


class AnyText(msgspec.Struct, kw_only=True, tag_field="type", tag="text"):
    """The reply is free."""


class JsonObject(msgspec.Struct, kw_only=True, tag_field="type", tag="json_object"):
    """The reply is a JSON object."""


class NamedSchema(msgspec.Struct, kw_only=True, omit_defaults=True):
    name: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-]{1,64}\Z")]
    schema: Annotated[
        dict[str, Any],
        Meta(description="A JSON Schema of at most 65,536 bytes, nested at most 100 deep; references start with #."),
    ]
    strict: bool | None = None
    """Taken as OpenAI's clients send it: a reply is held to its schema either way."""
    description: Annotated[str, Meta(max_length=1024)] | None = None


class JsonSchema(msgspec.Struct, kw_only=True, tag_field="type", tag="json_schema"):
    """The reply is JSON that fits the schema."""

    json_schema: NamedSchema


ResponseFormat = AnyText | JsonObject | JsonSchema


class Parameters(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What is absent or null is as the model's settings say."""

    max_tokens: ranges.MaxTokens | None = None
    temperature: ranges.Temperature | None = None
    top_p: ranges.ShareAboveZero | None = None
    top_k: ranges.TopK | None = None
    min_p: ranges.Share | None = None
    typical_p: ranges.ShareAboveZero | None = None
    repeat_penalty: ranges.RepeatPenalty | None = None
    presence_penalty: ranges.Penalty | None = None
    frequency_penalty: ranges.Penalty | None = None
    seed: ranges.Seed | None = None
    stop: ranges.StopText | ranges.Stops | None = None
    """Text, or a list of at most 16; an empty list: the model's own stop strings do not count either."""
    response_format: ResponseFormat | None = None
    """What the reply is held to while it is written; not together with `grammar_name`."""


NAMES = Parameters.__struct_fields__


def said(given: Parameters) -> Parameters | None:
    """What a request says of its parameters, without all else that stands in it; None: nothing."""
    parameters = Parameters(**{name: getattr(given, name) for name in NAMES})
    return None if parameters == Parameters() else parameters


def allowed() -> dict[str, str]:
    """For each parameter what would be right, in words."""
    told = {
        field.name: f"expected {ranges.in_words(ranges.without_none(field.type))}"
        for field in msgspec.structs.fields(Parameters)
        if field.name not in ("stop", "response_format")
    }
    return told | {
        "stop": f"expected {ranges.title(ranges.StopText)}, or a list of at most 16 such texts",
        "response_format.type": "expected one of text, json_object, json_schema",
        "response_format.json_schema.name": "expected 1 to 64 letters, digits, _ or -",
    }
