"""An example of each shape that crosses the API, for its reference. Each field's example is its value in the first of
these that has one. The first example of a request is what a command shows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from llamalith_app.contracts import (
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

_SENT = datetime(2026, 11, 30, 9, 15, 2, tzinfo=UTC)
_STARTED = datetime(2026, 11, 30, 9, 15, 3, tzinfo=UTC)
_ENDED = datetime(2026, 11, 30, 9, 15, 9, tzinfo=UTC)
_SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}

_PROGRESS = jobs.Progress(
    phase="decode",
    position=3,
    waits_for=11,
    start_eta_s=12.5,
    eta_s=20.1,
    prompt_tokens=512,
    prompt_tokens_done=512,
    completion_tokens=45,
    tokens_per_s=12.3,
)
_WANTED = parameters.Parameters(
    max_tokens=200,
    temperature=0.7,
    top_p=0.95,
    top_k=40,
    min_p=0.05,
    typical_p=1.0,
    repeat_penalty=1.1,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    seed=42,
    stop=("\n\n",),
    response_format=parameters.JsonSchema(json_schema=parameters.NamedSchema(name="dragon", schema=_SCHEMA)),
    truncation="auto",
    raw=False,
    reasoning_effort="low",
    chat_template_kwargs={"enable_thinking": True},
)
_REQUEST: dict[str, Any] = {
    **{name: getattr(_WANTED, name) for name in parameters.NAMES},
    "content": "Describe a dragon.",
    "model": "smollm2",
    "system_prompt": "You are brief.",
    "assistant_context": "The dragon is called Ember.",
    "grammar_name": "json",
    "timeout_s": 120.0,
    "queue_timeout_s": 3600.0,
    "max_attempts": 3,
    "priority": "interactive",
    "parent": 7,
}
_TIMES: dict[str, Any] = {
    "loaded_at": _STARTED + timedelta(seconds=0.4),
    "prompt_read_at": _STARTED + timedelta(seconds=0.6),
    "first_token_at": _STARTED + timedelta(seconds=0.6),
}
_DONE = jobs.Job(
    id=12,
    turn_id=9,
    conversation_id="dragon",
    model="smollm2",
    status="done",
    created_at=_SENT,
    processed_at=_ENDED,
    grammar_name=None,
    priority="normal",
    reply_valid=True,
    attempt=1,
    started_at=_STARTED,
    error=None,
    finish_reason="stop",
    prompt_tokens=38,
    prompt_tokens_reused=20,
    completion_tokens=45,
    thinking_tokens=12,
    omitted_messages=0,
    timeout_s=120.0,
    queue_timeout_s=3600.0,
    max_attempts=3,
    next_attempt_at=None,
    retry_of=None,
    retried_as=None,
    user_input="Describe a dragon.",
    system_prompt="You are brief.",
    parameters=parameters.Parameters(temperature=0.2, max_tokens=200),
    unenforced=["#/uniqueItems"],
    result="Green, old, and fond of tea.",
    thinking="A dragon. It should be friendly.",
    thinking_s=1.2,
    **_TIMES,
)
_FAILED = msgspec.structs.replace(
    _DONE,
    id=13,
    status="error",
    attempt=3,
    grammar_name="json",
    error=jobs.JobError(kind="timeout", reason="It ran for 120.0 s; timeout_s allowed 120."),
    next_attempt_at=_ENDED,
    retry_of=11,
    retried_as=14,
    reply_problem="#/name is missing",
    partial="Green, old, and",
    progress=_PROGRESS,
)
_BRIEF = jobs.JobBrief(**{name: getattr(_DONE, name) for name in jobs.JobBrief.__struct_fields__})
_BRIEF_FAILED = jobs.JobBrief(**{name: getattr(_FAILED, name) for name in jobs.JobBrief.__struct_fields__})
_ATTEMPT = jobs.Attempt(
    attempt=1, worker_id=1, started_at=_STARTED, ended_at=_ENDED, outcome="done", kind=None, reason=None, **_TIMES
)
_LOST = jobs.Attempt(
    attempt=1,
    worker_id=1,
    started_at=_STARTED,
    ended_at=_ENDED,
    outcome="lost",
    kind="worker_lost",
    reason="Its worker was lost.",
)
_TURN = conversations.TreeTurn(
    id=9,
    parent=7,
    depth=1,
    conversation_id="dragon",
    created_at=_SENT,
    job_id=12,
    model="smollm2",
    status="done",
    system_prompt="You are brief.",
    prompt="Describe a dragon.",
    reply="Green, old, and fond of tea.",
)
_LISTED = conversation_list.ConversationBrief(
    conversation_id="dragon",
    title="About dragons",
    first_prompt="Describe a dragon.",
    tags=["stories"],
    pinned=True,
    archived=False,
    source="api",
    n_turns=2,
    status="done",
    last_at=_ENDED,
    found=conversation_list.Found(text="Green, old, and fond of tea.", marks=[[24, 27]]),
)
_EXPORTED_TURN = export.ExportedTurn(
    id=9,
    parent=7,
    messages=[
        export.ExportedMessage(role="user", content="Describe a dragon."),
        export.ExportedMessage(role="assistant", content="Green, old, and fond of tea.", is_reply=True),
    ],
    created_at=_SENT,
    model="smollm2",
    status="done",
)
_MESSAGE = conversations.Message(role="user", content="Describe a dragon.")
_CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
_REPLY = conversations.Message(
    role="assistant",
    content="Green, old, and fond of tea.",
    tool_calls=[_CALL],
    thinking="A dragon. It should be friendly.",
    thinking_s=1.2,
)
_MODEL = models.Model(
    name="smollm2",
    file="/models/smollm2.gguf",
    size_bytes=98_000_000,
    n_ctx=4096,
    format="auto",
    state="loaded",
    progress=None,
    reason=None,
    slots=4,
    slots_used=1,
    tokens_per_s=41.2,
    prompt_tokens_per_s=310.0,
    prompt_tokens_computed=12_400,
    prompt_tokens_reused=8_100,
    queued=2,
    memory_bytes=640_000_000,
    prompt_format=models.PromptFormat(source="vocabulary", name="gemma", system="own"),
    reasoning="think",
)
_LOADING = msgspec.structs.replace(_MODEL, state="loading", progress=0.4, reason="There is no such file.")

_SAMPLED: dict[str, Any] = {
    "model": "smollm2",
    "stream": False,
    "stream_options": openai.StreamOptions(include_usage=True),
    "max_tokens": 200,
    "temperature": 0.7,
    "top_p": 0.95,
    "top_k": 40,
    "min_p": 0.05,
    "typical_p": 1.0,
    "repeat_penalty": 1.1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": 42,
    "stop": ("\n\n",),
    "n": 1,
    "service_tier": "priority",
    "store": True,
    "truncation": "auto",
    "logit_bias": {},
    "logprobs": False,
}
_USAGE = openai.Usage(
    prompt_tokens=38,
    completion_tokens=45,
    total_tokens=83,
    prompt_tokens_details=openai.PromptTokensDetails(cached_tokens=20),
    completion_tokens_details=openai.CompletionTokensDetails(reasoning_tokens=12),
)
_OPENAI_TIMINGS = openai.OpenAITimings(
    cache_n=20,
    prompt_n=18,
    prompt_ms=58.1,
    prompt_per_second=309.8,
    predicted_n=45,
    predicted_ms=1092.0,
    predicted_per_second=41.2,
)
_MADE: dict[str, Any] = {"created": 1_796_030_102, "model": "smollm2", "system_fingerprint": "llamalith-0.1.0"}
_ASKED = openai.ChatMessage(role="user", content="Describe a dragon.")
_REPLIED = openai.ReplyMessage(
    content="Green, old, and fond of tea.", reasoning_content="A dragon. It should be friendly."
)
_CHAT_CHOICE = openai.ChatChoice(index=0, message=_REPLIED, finish_reason="stop")
_PIECE = openai.ChatDelta(role="assistant", content="Green, ", reasoning_content="A dragon.")
_CHUNK_CHOICE = openai.ChatChunkChoice(index=0, delta=_PIECE, finish_reason="stop")
_TEXT_CHOICE = openai.TextChoice(index=0, text="Green, old, and fond of tea.", finish_reason="stop")
_OPENAI_ERROR = openai.OpenAIError(
    message="n: one reply is drawn for each call, so only 1 is possible; send the call again for another",
    type="invalid_request_error",
    param="n",
    code="bad_input",
)
_OPENAI_MODEL = openai.OpenAIModel(
    id="smollm2",
    created=0,
    owned_by="llamalith",
    status=openai.OpenAIModelStatus(value="loaded", failed=False),
)
_OUTPUT = responses.OutputText(text="Green, old, and fond of tea.")
_MESSAGE_ITEM = responses.OutputMessage(id="msg_12", status="completed", content=[_OUTPUT])
_REASONING_ITEM = responses.OutputReasoning(
    id="rs_12", status="completed", content=[responses.ReasoningText(text="A dragon. It should be friendly.")]
)
_RESPONSE_USAGE = responses.ResponseUsage(
    input_tokens=38,
    input_tokens_details=responses.InputTokensDetails(cached_tokens=20),
    output_tokens=45,
    output_tokens_details=responses.OutputTokensDetails(reasoning_tokens=12),
    total_tokens=83,
)
_RESPONSE = responses.Response(
    id="resp_12",
    created_at=1_796_030_102,
    completed_at=1_796_030_109,
    status="completed",
    background=False,
    error=_OPENAI_ERROR,
    incomplete_details=responses.IncompleteDetails(reason="max_output_tokens"),
    instructions="You are brief.",
    max_output_tokens=200,
    metadata={"order": "4711"},
    model="smollm2",
    output=[_REASONING_ITEM, _MESSAGE_ITEM],
    previous_response_id="resp_11",
    store=True,
    temperature=0.7,
    text=responses.TextFormatTold(format={"type": "text"}),
    top_p=0.95,
    truncation="disabled",
    usage=_RESPONSE_USAGE,
)
_INPUT_MESSAGE = responses.InputMessage(
    id="msg_12_0", role="user", content=[responses.InputText(type="input_text", text="Describe a dragon.")]
)
_ACCEPTED = jobs.JobAccepted(
    ok=True, queued=True, job_id=12, conversation_id="dragon", created_new=False, model="smollm2", turn_id=9
)

_ALL: tuple[msgspec.Struct, ...] = (
    jobs.JobCreate(content="Describe a dragon.", conversation_id="dragon"),
    jobs.JobCreate(**_REQUEST, conversation_id="dragon"),
    jobs.JobCompare(content="Describe a dragon.", models=["smollm2", "qwen3"], conversation_id="dragon"),
    jobs.JobCompare(
        # Whoever fills in a form of all fields leaves it empty.
        **_REQUEST | {"model": ""},
        models=["smollm2", "qwen3"],
        conversation_id="dragon",
    ),
    jobs.ReplyCreate(content="And what does it eat?"),
    jobs.ReplyCreate(**_REQUEST),
    jobs.JobChange(priority="batch"),
    jobs.JobChange(content="Describe a friendly dragon."),
    jobs.Regenerate(temperature=1.0),
    jobs.Regenerate(**{name: getattr(_WANTED, name) for name in parameters.NAMES}, model="smollm2"),
    jobs.LegacySubmit(user_input="Describe a dragon.", session_id="dragon"),
    jobs.LegacySubmit(user_input="Describe a dragon.", session_id="dragon", model="smollm2", system_prompt="Be brief."),
    _ACCEPTED,
    jobs.CompareAccepted(
        ok=True, jobs=[_ACCEPTED, msgspec.structs.replace(_ACCEPTED, job_id=13, model="qwen3", turn_id=10)]
    ),
    conversations.TurnChoice(turn_id=7),
    conversations.ForkCreate(turn_id=7),
    conversations.ForkCreate(turn_id=7, conversation_id="dragon-2"),
    conversations.Head(ok=True, conversation_id="dragon", head=8),
    _TURN,
    conversations.TurnTree(conversation_id="dragon", head=8, turns=[_TURN], more=False),
    conversation_list.Found(text="Green, old, and fond of tea.", marks=[[24, 27]]),
    _LISTED,
    conversation_list.ConversationBriefs(conversations=[_LISTED], next=9),
    conversation_list.ConversationChange(title="About dragons", pinned=True),
    conversation_list.ConversationChange(title="About dragons", pinned=True, archived=False, tags=["stories"]),
    conversation_list.ConversationsChange(conversation_ids=["dragon", "dragon-2"], archived=True),
    conversation_list.ConversationsChange(
        conversation_ids=["dragon", "dragon-2"],
        pinned=False,
        archived=True,
        deleted=False,
        add_tags=["stories"],
        remove_tags=["drafts"],
    ),
    conversation_list.ConversationsChanged(ok=True, changed=["dragon"], cancelled=1),
    export.ConversationExport(
        format="llamalith-conversation-1",
        title="About dragons",
        turns=[msgspec.structs.replace(_EXPORTED_TURN, parent=None)],
    ),
    export.ConversationExport(
        format="llamalith-conversation-1",
        conversation_id="dragon",
        title="About dragons",
        tags=["stories"],
        created_at=_SENT,
        head=9,
        turns=[msgspec.structs.replace(_EXPORTED_TURN, parent=None)],
    ),
    _EXPORTED_TURN,
    export.ExportedMessage(role="user", content="Describe a dragon."),
    export.ExportedMessage(
        role="assistant", content="", tool_calls=[_CALL], is_reply=True, thinking="Is it cold?", thinking_s=0.8
    ),
    export.ExportedMessage(role="tool", content="4 °C", tool_call_id="call_1"),
    export.Imported(ok=True, conversation_id="3f0c", n_turns=2, n_left_out=0),
    jobs.LegacyAccepted(job_id=12, conversation_id="dragon", created_new=False),
    _PROGRESS,
    jobs.JobError(kind="timeout", reason="It ran for 120.0 s; timeout_s allowed 120."),
    _BRIEF,
    _BRIEF_FAILED,
    _DONE,
    _FAILED,
    _ATTEMPT,
    _LOST,
    jobs.AttemptList(attempts=[_ATTEMPT]),
    jobs.Retried(ok=True, job_ids=[15, 16], more=False),
    jobs.JobList(jobs=[_DONE]),
    jobs.JobBriefList(jobs=[_BRIEF]),
    jobs.Cancelled(ok=True, cancelled=3),
    _MESSAGE,
    _REPLY,
    conversations.Message(role="tool", content="4 °C", tool_call_id="call_1"),
    conversations.MessageList(conversation_id="dragon", exists=True, messages=[_MESSAGE]),
    conversations.Latest(
        conversation_id="dragon", exists=True, last_user=_MESSAGE, last_assistant=_REPLY, last_job=_DONE
    ),
    conversations.LegacyStatus(conversation_id="dragon", exists=True, response="Green, old, and fond of tea."),
    events.ProgressEvent(
        **{name: getattr(_PROGRESS, name) for name in jobs.Progress.__struct_fields__}, job_id=12, attempt=1
    ),
    events.Delta(job_id=12, text="Green, ", offset=0, tokens=[9707, 11]),
    events.Thinking(job_id=12, text="A dragon. ", tokens=[32, 26843]),
    events.Restart(job_id=12, attempt=2),
    health.Health(),
    health.Readiness(ready=True, database="ok", redis="ok", worker="ok"),
    _MODEL,
    _LOADING,
    models.PromptFormat(source="vocabulary", name="gemma", system="own"),
    models.ModelAsked(ok=True, model="smollm2"),
    models.ModelList(models=[_MODEL]),
    openai.ChatCompletionCreate(messages=[_ASKED], model="smollm2"),
    openai.ChatCompletionCreate(
        **_SAMPLED,
        messages=[_ASKED],
        max_completion_tokens=200,
        response_format=parameters.AnyText(),
        reasoning_effort="low",
        chat_template_kwargs={"enable_thinking": True},
        top_logprobs=0,
        tools=[],
        functions=[],
        modalities=["text"],
        audio={},
    ),
    openai.CompletionCreate(prompt="Once upon a time", model="smollm2"),
    openai.CompletionCreate(**_SAMPLED, prompt="Once upon a time", best_of=1, echo=False, suffix=""),
    responses.ResponseCreate(input="Describe a dragon.", model="smollm2"),
    responses.ResponseCreate(
        input=[responses.InputItem(role="user", content="Describe a dragon.")],
        model="smollm2",
        instructions="You are brief.",
        previous_response_id="resp_11",
        stream=False,
        background=True,
        store=True,
        max_output_tokens=200,
        temperature=0.7,
        top_p=0.95,
        text=responses.TextFormat(format=parameters.AnyText()),
        reasoning=responses.ReasoningAsked(effort="low"),
        truncation="auto",
        service_tier="flex",
        metadata={"order": "4711"},
        tools=[],
        conversation="",
        prompt={},
        top_logprobs=0,
    ),
    responses.TextFormat(format=parameters.AnyText()),
    responses.ReasoningAsked(effort="low"),
    responses.InputItem(type="message", role="user", content="Describe a dragon.", id="msg_11"),
    _RESPONSE,
    _RESPONSE.text,
    responses.IncompleteDetails(reason="max_output_tokens"),
    _RESPONSE_USAGE,
    _RESPONSE_USAGE.input_tokens_details,
    _RESPONSE_USAGE.output_tokens_details,
    _MESSAGE_ITEM,
    _OUTPUT,
    _REASONING_ITEM,
    _REASONING_ITEM.content[0],
    responses.ResponseDeleted(id="resp_12", deleted=True),
    responses.InputItemList(data=[_INPUT_MESSAGE], first_id="msg_12_0", last_id="msg_12_0", has_more=False),
    _INPUT_MESSAGE,
    _INPUT_MESSAGE.content[0],
    openai.StreamOptions(include_usage=True),
    _ASKED,
    openai.ChatMessage(role="assistant", content=[openai.ContentPart(type="text", text="Green.")], tool_calls=[]),
    openai.ContentPart(type="text", text="Describe a dragon.", refusal="No."),
    openai.ChatCompletion(
        id="chatcmpl-12",
        object="chat.completion",
        **_MADE,
        choices=[_CHAT_CHOICE],
        usage=_USAGE,
        timings=_OPENAI_TIMINGS,
    ),
    _CHAT_CHOICE,
    _REPLIED,
    openai.ChatCompletionChunk(
        id="chatcmpl-12",
        object="chat.completion.chunk",
        **_MADE,
        choices=[_CHUNK_CHOICE],
        usage=_USAGE,
        timings=_OPENAI_TIMINGS,
    ),
    _CHUNK_CHOICE,
    _PIECE,
    openai.Completion(
        id="cmpl-12",
        object="text_completion",
        **_MADE,
        choices=[_TEXT_CHOICE],
        usage=_USAGE,
        timings=_OPENAI_TIMINGS,
    ),
    _TEXT_CHOICE,
    _USAGE,
    _USAGE.prompt_tokens_details,
    _USAGE.completion_tokens_details,
    _OPENAI_TIMINGS,
    _OPENAI_ERROR,
    openai.OpenAIErrorBody(error=_OPENAI_ERROR),
    _OPENAI_MODEL,
    _OPENAI_MODEL.status,
    openai.OpenAIModelList(data=[_OPENAI_MODEL]),
    openai.OpenAIModelAsk(model="smollm2"),
    openai.OpenAIModelAsked(success=True),
    _WANTED,
    parameters.AnyText(),
    parameters.JsonObject(schema=_SCHEMA),
    parameters.NamedSchema(name="dragon", schema=_SCHEMA, strict=True, description="A dragon."),
    parameters.JsonSchema(
        json_schema=parameters.NamedSchema(name="dragon", schema=_SCHEMA),
        name="dragon",
        schema=_SCHEMA,
        strict=False,
        description="A dragon.",
    ),
    problems.Problem(
        type="about:llamalith/bad-input",
        title="Bad input",
        status=400,
        detail="temperature: expected a number ≥ 0 and ≤ 5",
        request_id="5c5b03ca0751eadd",
        error="temperature: expected a number ≥ 0 and ≤ 5",
    ),
)

IN_ADDRESSES: dict[str, Any] = {
    "job_id": 12,
    "conversation_id": "dragon",
    "name": "smollm2",
    "model": "smollm2",
    "status": "error",
    "error_kind": "engine_died",
    "limit": 20,
    "before": 12,
    "after": 9,
    "turn_id": 9,
    "texts": False,
    "q": "dragon tea",
    "archived": "any",
    "tag": "stories",
    "source": "page",
    "format": "md",
    "response_id": "resp_12",
    "stream": True,
    "starting_after": 42,
    "order": "asc",
    "Idempotency-Key": "order-4711",
    "Last-Event-ID": "12:1-34",
}
"""By the name of a parameter in a path, a query or a header."""


def of_shape(shape: str) -> list[dict[str, Any]]:
    """The examples of the shape of this name as JSON values, without what is null or absent."""
    return [
        {name: value for name, value in msgspec.to_builtins(one).items() if value is not None}
        for one in _ALL
        if type(one).__name__ == shape
    ]


def of_fields(shape: str) -> dict[str, Any]:
    """An example for each field of the shape that has one."""
    found: dict[str, Any] = {}
    for one in of_shape(shape):
        found = one | found
    return found


def request_body(shape: str) -> dict[str, Any] | None:
    """What a command sends as an example; None: nothing is known of the shape."""
    first = next((one for one in _ALL if type(one).__name__ == shape), None)
    if first is None:
        return None
    defaults = {field.encode_name: field.default for field in msgspec.structs.fields(type(first))}
    return {
        name: value
        for name, value in msgspec.to_builtins(first).items()
        if value is not None and value != defaults.get(name)
    }
