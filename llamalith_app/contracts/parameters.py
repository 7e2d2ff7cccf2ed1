"""A job's sampling parameters and its response format. They override the model's settings, which override the defaults.

The names are those of OpenAI and llama.cpp. The limits are those of `config.json` (`settings/ranges.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from llamalith_app.contracts.text import CONTROL_FREE
from llamalith_app.settings import ranges
from llamalith_app.settings.formats import END

Schema = Annotated[
    dict[str, Any],
    Meta(description="A JSON Schema of at most 65,536 bytes, nested at most 100 deep; references start with #."),
]
MAX_SCHEMA_NAME = 256
SchemaName = Annotated[
    str,
    Meta(
        title=f"at most {MAX_SCHEMA_NAME} characters without control characters",
        max_length=MAX_SCHEMA_NAME,
        pattern=CONTROL_FREE,
        description=f"Decides nothing. At most {MAX_SCHEMA_NAME} characters.",
    ),
]
SchemaDescription = Annotated[str, Meta(max_length=4096, description="Decides nothing.")]


EffortWord = Literal["none", "low", "medium", "high"]
EffortTokens = Annotated[int, Meta(ge=0, le=1_048_576, title="a whole number of tokens ≥ 0 and ≤ 1048576")]
MAX_TEMPLATE_ARGUMENTS = 16
MAX_ARGUMENT_CHARACTERS = 1000
OF_THE_TEMPLATE = "messages|tools|functions|tool_choice|function_call|bos_token|eos_token|add_generation_prompt"
TemplateArgument = Annotated[
    str,
    Meta(
        pattern=rf"^(?!(?:{OF_THE_TEMPLATE}|raise_exception|strftime_now){END})[A-Za-z][A-Za-z0-9_]{{0,63}}{END}",
    ),
]
ArgumentText = Annotated[
    str,
    Meta(max_length=MAX_ARGUMENT_CHARACTERS),
]
ArgumentInteger = Annotated[int, Meta(ge=-(2**53), le=2**53)]
ArgumentNumber = Annotated[float, Meta(ge=-1e300, le=1e300)]
TemplateArguments = Annotated[
    dict[TemplateArgument, bool | ArgumentInteger | ArgumentNumber | ArgumentText | None],
    Meta(
        title=(
            f"an object of at most {MAX_TEMPLATE_ARGUMENTS} numbers, booleans and texts of at most"
            f" {MAX_ARGUMENT_CHARACTERS} characters, under names of letters, digits and _ that the template does not"
            " get anyway, as it gets messages"
        ),
        max_length=MAX_TEMPLATE_ARGUMENTS,
    ),
]


class AnyText(msgspec.Struct, kw_only=True, tag_field="type", tag="text", forbid_unknown_fields=True):
    """The reply is free."""


class JsonObject(
    msgspec.Struct, kw_only=True, omit_defaults=True, tag_field="type", tag="json_object", forbid_unknown_fields=True
):
    """The reply is a JSON object, or fits the schema, as llama.cpp has it."""

    schema: Schema | None = None


class NamedSchema(msgspec.Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    name: SchemaName | None = None
    schema: Schema
    strict: bool | None = None
    """True: a schema with a keyword that cannot be enforced while decoding is refused. Otherwise it is accepted, the
    job's `unenforced` names these keywords, and the whole reply is validated at its end."""
    description: SchemaDescription | None = None


class JsonSchema(
    msgspec.Struct, kw_only=True, omit_defaults=True, tag_field="type", tag="json_schema", forbid_unknown_fields=True
):
    """The reply is JSON that fits the schema, which stands in `json_schema`, or beside `type` as the Responses API has
    it."""

    json_schema: NamedSchema | None = None
    name: SchemaName | None = None
    schema: Schema | None = None
    strict: bool | None = None
    """As `strict` in `json_schema`."""
    description: SchemaDescription | None = None


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
    stop: ranges.StopText | ranges.StopList | None = None
    """Text, or a list of at most 16; an empty list: the model's own stop strings do not count either."""
    response_format: ResponseFormat | None = None
    """Enforced while decoding; not together with `grammar_name`."""
    truncation: Literal["auto", "disabled"] | None = None
    """Where the conversation is longer than the context: `auto` leaves out its oldest turns, which is the default;
    `disabled` ends the job as an error of kind `context_overflow`."""

    raw: bool | None = None
    """True: the model reads the prompt alone and as it is, without a chat template; control tokens in it count, and
    nothing of the reply is kept apart as thinking."""
    reasoning_effort: EffortWord | EffortTokens | None = None
    """How much a reasoning model may think: `none`, `low` (at most 512 tokens), `medium` (2,048), `high` (as the
    model's settings say), or a number of tokens. The chat template is told, and the thinking is closed after so
    many."""
    chat_template_kwargs: TemplateArguments | None = None
    """Handed to the model's chat template as they are, over what `reasoning_effort` makes of them."""

    @property
    def wants_json(self) -> bool:
        return isinstance(self.response_format, JsonObject | JsonSchema)


NAMES = Parameters.__struct_fields__


class WantedSchema(NamedTuple):
    """The JSON Schema that a reply is to fit."""

    schema: dict[str, Any]
    place: str
    """The path of the schema in the request, for messages."""
    strict: bool


def wanted_schema(wanted: ResponseFormat | None) -> WantedSchema | None:
    """The schema of a response format. None: it has none."""
    if isinstance(wanted, JsonObject) and wanted.schema:
        return WantedSchema(wanted.schema, "response_format.schema", False)
    if not isinstance(wanted, JsonSchema):
        return None
    if wanted.json_schema is not None:
        named = wanted.json_schema
        return WantedSchema(named.schema, "response_format.json_schema.schema", bool(named.strict))
    return WantedSchema(wanted.schema or {}, "response_format.schema", bool(wanted.strict))


def parameters_given(request: Parameters) -> Parameters | None:
    """The parameters of a request, without its other fields. None: it sets none."""
    parameters = Parameters(**{name: getattr(request, name) for name in NAMES})
    return None if parameters == Parameters() else parameters


def parameters_from_texts(texts: Mapping[str, str]) -> Parameters:
    """The parameters that a form sends as texts, stop strings one a line; empty ones are not set. Numbers may have a
    decimal comma. Raises msgspec.ValidationError."""
    given: dict[str, Any] = {
        name: text.strip().replace(",", ".") for name, text in texts.items() if name in NAMES and text.strip()
    }
    if stops := texts.get("stop", "").replace("\r\n", "\n").strip("\n"):
        given["stop"] = stops.split("\n")
    return msgspec.convert(given, Parameters, strict=False)


def texts_of(parameters: Parameters | None) -> dict[str, str]:
    """The parameters that are set, as a form shows them."""
    given = {} if parameters is None else msgspec.structs.asdict(parameters)
    stops = given.pop("stop", None)
    given.pop("response_format", None)
    given.pop("truncation", None)
    given.pop("raw", None)
    given.pop("chat_template_kwargs", None)
    texts = {
        name: format(value, "g") if isinstance(value, float) else str(value)
        for name, value in given.items()
        if value is not None
    }
    if stops:
        texts["stop"] = stops if isinstance(stops, str) else "\n".join(stops)
    return texts
