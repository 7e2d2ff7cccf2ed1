"""What OpenAI clients send to `/v1/responses` and get. The names are OpenAI's; unknown fields are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from llamalith_app.contracts.openai import MAX_MESSAGES, AnyEffort, ContentPart, OpenAIError, Refused
from llamalith_app.contracts.parameters import ResponseFormat
from llamalith_app.contracts.text import Name, Text
from llamalith_app.settings import ranges

ItemId = Annotated[str, Meta(max_length=64)]
ResponseId = Annotated[str, Meta(max_length=64, description="The id of a response: `resp_` and its job's number.")]
ResponseStatus = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class InputItem(msgspec.Struct, kw_only=True):
    type: (
        Annotated[str, Meta(max_length=100, extra_json_schema={"enum": ["message", "item_reference", "reasoning"]})]
        | None
    ) = None
    """`message` (also where it is absent), `item_reference`, or `reasoning`, which is skipped. Others are refused."""
    role: Literal["developer", "system", "user", "assistant"] | None = None
    content: Text | Annotated[list[ContentPart], Meta(max_length=1000)] | None = None
    id: ItemId | None = None
    """Of an `item_reference`: a message or a reasoning of an earlier response."""


class TextFormat(msgspec.Struct, kw_only=True):
    format: ResponseFormat | None = None


class ReasoningAsked(msgspec.Struct, kw_only=True):
    effort: AnyEffort | None = None
    """How much a reasoning model may think."""


class ResponseCreate(msgspec.Struct, kw_only=True):
    model: Name | None = None
    """One of `GET /v1/models`; absent or empty: the first of them."""
    input: Text | Annotated[list[InputItem], Meta(min_length=1, max_length=MAX_MESSAGES)]
    instructions: Text | None = None
    """The system prompt of this response alone."""
    previous_response_id: ResponseId | None = None
    """The response that this one goes on from; where it is not there yet, this one waits for it."""
    stream: bool | None = None
    background: bool | None = None
    """True: the answer comes at once, and the job goes on whoever leaves."""
    store: bool | None = None
    """False: the response is deleted a minute after its end."""
    max_output_tokens: ranges.MaxTokens | None = None
    temperature: ranges.Temperature | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    text: TextFormat | None = None
    reasoning: ReasoningAsked | None = None
    truncation: Literal["auto", "disabled"] | None = None
    """`auto`: where the input is longer than the context, the oldest is left out; else that is an error."""
    service_tier: (
        Annotated[str, Meta(max_length=40, description="`priority` or `flex`: interactive, batch.")] | None
    ) = None
    metadata: Annotated[dict[str, Any], Meta(max_length=100)] | None = None
    """Comes back in this answer, and is not stored."""
    tools: Refused = None
    conversation: Refused = None
    prompt: Refused = None
    top_logprobs: Refused = None


class OutputText(msgspec.Struct, kw_only=True):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class ReasoningText(msgspec.Struct, kw_only=True):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class OutputReasoning(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thought before its reply."""

    id: str
    status: ItemStatus
    summary: list[Any] = []
    content: list[ReasoningText]


class InputTokensDetails(msgspec.Struct, kw_only=True):
    cached_tokens: int
    """Those that the engine still had and did not compute again."""
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, kw_only=True):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, kw_only=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct, kw_only=True):
    reason: Literal["max_output_tokens"]


class TextFormatTold(msgspec.Struct, kw_only=True):
    format: dict[str, Any]


class Response(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    """Seconds since 1970."""
    completed_at: int | None
    status: ResponseStatus
    background: bool
    error: OpenAIError | None
    """Why it failed or was cancelled."""
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[OutputMessage | OutputReasoning]
    parallel_tool_calls: bool = True
    previous_response_id: str | None
    store: bool
    temperature: float | None
    text: TextFormatTold
    tool_choice: Literal["auto"] = "auto"
    tools: list[Any] = []
    top_p: float | None
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    """Null until it has ended."""


class ResponseDeleted(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    deleted: bool


class InputText(msgspec.Struct, kw_only=True):
    type: Literal["input_text", "output_text"]
    text: str


class InputMessage(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    role: Literal["system", "user", "assistant"]
    status: Literal["completed"] = "completed"
    content: list[InputText]


class InputItemList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[InputMessage]
    first_id: str | None
    last_id: str | None
    has_more: bool
