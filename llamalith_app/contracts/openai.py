"""What OpenAI clients send to `/v1` and get: chat completions, completions, models and errors.

The names are OpenAI's, and some are llama-server's. Unknown fields are ignored; those that a reply would be wrong
without are declared here, so that `web/openai/asked.py` can refuse them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from llamalith_app.contracts.parameters import EffortTokens, ResponseFormat, TemplateArguments
from llamalith_app.contracts.text import Name, Text
from llamalith_app.settings import ranges

MAX_MESSAGES = 10_000
AnySeed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1, description="Only its lowest 32 bits count.")]
Refused = Annotated[
    Any,
    Meta(
        description="Refused, where it asks for something.",
        extra_json_schema={"enum": [None, False, 0, "", [], {}]},
    ),
]
"""A field that is read only to be refused."""
OnlyOne = Annotated[int, Meta(ge=1, le=128, description="1; more are refused.", extra_json_schema={"enum": [1]})]


TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


class ContentPart(msgspec.Struct, kw_only=True):
    type: Annotated[
        str,
        Meta(max_length=100, description="`text`; others are refused.", extra_json_schema={"enum": list(TEXT_PARTS)}),
    ]
    text: Text | None = None
    refusal: Text | None = None
    """Counts as text."""


class ChatMessage(msgspec.Struct, kw_only=True):
    role: Annotated[
        Literal["developer", "system", "user", "assistant", "tool", "function"],
        Meta(extra_json_schema={"enum": ["developer", "system", "user", "assistant"]}),
    ]
    """`developer` is `system`. Tools come with a later version."""
    content: Text | Annotated[list[ContentPart], Meta(max_length=1000)] | None = None
    """The texts of several parts are joined."""
    tool_calls: Refused = None


AnyEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | EffortTokens
"""How much a reasoning model may think. `minimal` is `low`; `xhigh` and `max` are `high`."""


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    """The last chunk tells the tokens."""


class Sampled(msgspec.Struct, kw_only=True):
    """What every call may say of how its reply is drawn."""

    model: Name | None = None
    """One of `GET /v1/models`; absent or empty: the first of them."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: ranges.MaxTokens | None = None
    temperature: ranges.Temperature | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    """0 is taken for the smallest share that there is."""
    top_k: ranges.TopK | None = None
    min_p: ranges.Share | None = None
    typical_p: ranges.ShareAboveZero | None = None
    repeat_penalty: ranges.RepeatPenalty | None = None
    presence_penalty: ranges.Penalty | None = None
    frequency_penalty: ranges.Penalty | None = None
    seed: AnySeed | None = None
    stop: str | ranges.StopList | None = None
    n: OnlyOne | None = None
    service_tier: (
        Annotated[str, Meta(max_length=40, description="`priority` or `flex`: interactive, batch.")] | None
    ) = None
    store: bool | None = None
    """False: the texts are deleted a minute after the answer."""
    truncation: Literal["auto", "disabled"] | None = None
    """`auto`: where the messages are longer than the context, the oldest are left out; else that is an error."""
    logit_bias: Refused = None
    logprobs: Refused = None


class ChatCompletionCreate(Sampled, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    """Where they begin as a conversation that there is, it goes on."""
    max_completion_tokens: ranges.MaxTokens | None = None
    """Goes before `max_tokens`."""
    response_format: ResponseFormat | None = None
    reasoning_effort: AnyEffort | None = None
    chat_template_kwargs: TemplateArguments | None = None
    """Handed to the model's chat template as they are."""
    top_logprobs: Refused = None
    tools: Refused = None
    functions: Refused = None
    modalities: list[Literal["text"]] | None = None
    audio: Refused = None


Prompt = Annotated[Text, Meta(min_length=1)]


class CompletionCreate(Sampled, kw_only=True):
    prompt: Prompt | Annotated[list[Prompt], Meta(min_length=1, max_length=1)]
    """It is sent to the model as the message of a user."""
    best_of: OnlyOne | None = None
    echo: bool | None = None
    """The prompt stands before the text."""
    suffix: Refused = None


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    cached_tokens: int
    """Those that the engine still had and did not compute again."""


class CompletionTokensDetails(msgspec.Struct, kw_only=True):
    reasoning_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class OpenAITimings(msgspec.Struct, kw_only=True):
    """As llama-server tells them."""

    cache_n: int
    """Tokens of the prompt that were not computed."""
    prompt_n: int
    """Those that were."""
    prompt_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float


FinishReason = Literal["stop", "length"]


class ReplyMessage(msgspec.Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str
    reasoning_content: str | UnsetType = UNSET
    """What the model thought before; absent: nothing."""
    refusal: None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: ReplyMessage
    logprobs: None = None
    finish_reason: FinishReason


class Made(msgspec.Struct, kw_only=True):
    id: str
    """The job's, behind a word for its kind."""
    object: str
    created: int
    """Seconds since 1970."""
    model: str
    system_fingerprint: str


class ChatCompletion(Made, kw_only=True):
    choices: list[ChatChoice]
    usage: Usage
    timings: OpenAITimings | UnsetType = UNSET


class ChatDelta(msgspec.Struct, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: None = None
    finish_reason: FinishReason | None


class ChatCompletionChunk(Made, kw_only=True):
    choices: list[ChatChunkChoice]
    """Empty in the chunk that tells the tokens."""
    usage: Usage | UnsetType | None = UNSET
    timings: OpenAITimings | UnsetType = UNSET


class TextChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None


class Completion(Made, kw_only=True):
    """The whole, and each chunk of it."""

    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET
    timings: OpenAITimings | UnsetType = UNSET


class OpenAIError(msgspec.Struct, kw_only=True):
    message: str
    type: str
    param: str | None
    """The field that it is about; null: none."""
    code: str | None


class OpenAIErrorBody(msgspec.Struct, kw_only=True):
    error: OpenAIError


StateWord = Literal["loaded", "loading", "unloaded"]


class OpenAIModelStatus(msgspec.Struct, kw_only=True):
    value: StateWord
    failed: bool | UnsetType = UNSET
    """The last load failed."""


class OpenAIModel(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    status: OpenAIModelStatus
    """As llama-server has it."""


class OpenAIModelList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[OpenAIModel]


class OpenAIModelAsk(msgspec.Struct, kw_only=True):
    model: Name


class OpenAIModelAsked(msgspec.Struct, kw_only=True):
    success: bool
