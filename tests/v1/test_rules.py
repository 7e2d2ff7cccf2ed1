"""What OpenAI clients rely on, line by line, and what they are refused: read as they read it, from the wire."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from llamalith_app.settings.config import Config
from llamalith_app.web.follow import Timings
from llamalith_app.web.openai import answers
from tests.settle import eventually
from tests.web.conftest import log_in, serving
from tests.worker.conftest import Script, working_in_process

REPLY = "Green, old, and fond of tea."
DRAGON = {"when": "dragon", "reply": REPLY}
THINKS = {"when": "dragon", "reply": f"<think>A dragon.</think>{REPLY}"}
USER = {"role": "user", "content": "A dragon?"}
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER]},
    TEXT: {"prompt": "A dragon?"},
    RESPONSES: {"input": "A dragon?"},
}
KINDS = ("context_overflow", "template", "grammar", "internal")


def data_of(stream: str) -> list[Any]:
    """The data of each event, decoded where it is JSON."""
    found = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in found]


async def stream_of(api: httpx.AsyncClient, path: str, **more: Any) -> str:
    answer = await api.post(path, json=ASKED[path] | {"stream": True, **more})
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    return answer.text


async def test_each_chunk_has_what_clients_read_unguarded(api: httpx.AsyncClient, script: Script) -> None:
    script.write(THINKS)
    *chunks, done = data_of(await stream_of(api, CHAT))
    assert done == "[DONE]"
    for number, chunk in enumerate(chunks):
        assert {"id", "object", "created", "model", "choices"} <= chunk.keys()
        (choice,) = chunk["choices"]
        assert choice["index"] == 0
        assert isinstance(choice["delta"], dict)
        assert choice["delta"].get("role", "assistant") == "assistant"
        assert choice["finish_reason"] == ("stop" if number == len(chunks) - 1 else None)
    assert "".join(chunk["choices"][0]["delta"].get("reasoning_content", "") for chunk in chunks) == "A dragon."
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == REPLY
    assert not any("usage" in chunk for chunk in chunks)


async def test_the_tokens_are_told_where_they_are_asked_for(api: httpx.AsyncClient, script: Script) -> None:
    script.write(THINKS)
    *_, usage, _ = data_of(await stream_of(api, CHAT, stream_options={"include_usage": True}))
    whole = (await api.post(CHAT, json=ASKED[CHAT])).json()
    assert usage["choices"] == []
    for told in (usage["usage"], whole["usage"]):
        assert told["prompt_tokens_details"]["cached_tokens"] == 0
        assert told["completion_tokens_details"]["reasoning_tokens"] == len("<think>A dragon.</think>")
        assert told["total_tokens"] == told["prompt_tokens"] + told["completion_tokens"]
    assert whole["choices"][0]["message"] == {
        "role": "assistant",
        "content": REPLY,
        "reasoning_content": "A dragon.",
        "refusal": None,
    }
    assert whole["timings"]["predicted_n"] == whole["usage"]["completion_tokens"]


async def test_a_completion_is_of_the_raw_prompt(api: httpx.AsyncClient, script: Script) -> None:
    script.write(DRAGON)
    whole = (await api.post(TEXT, json=ASKED[TEXT] | {"echo": True})).json()
    assert (whole["choices"][0]["text"], whole["object"]) == ("A dragon?" + REPLY, "text_completion")
    *chunks, done = data_of(await stream_of(api, TEXT))
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == REPLY
    (job, *_) = (await api.get("/api/jobs")).json()["jobs"]
    assert job["parameters"]["raw"] is True


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_job_that_ended_without_a_reply_is_a_400_or_an_error_in_the_stream(
    api: httpx.AsyncClient, script: Script, path: str, kind: str
) -> None:
    script.write({"when": "dragon", "refuse": "No.", "kind": kind})
    code = "context_length_exceeded" if kind == "context_overflow" else kind
    answer = await api.post(path, json=ASKED[path])
    error = answer.json()["error"]
    assert (answer.status_code, error["message"], error["code"]) == (400, "No.", code)
    assert error.keys() == {"message", "type", "param", "code"}
    told = [one for one in data_of(await stream_of(api, path)) if one != "[DONE]"]
    assert (told[-1]["error"]["message"], told[-1]["error"]["code"]) == ("No.", code)
    if path == RESPONSES:
        # Before that, for clients that know it.
        assert (told[-2]["type"], told[-2]["response"]["error"]["code"]) == ("response.failed", code)


@pytest.mark.parametrize("path", ASKED)
async def test_a_cancelled_job_is_a_400(api: httpx.AsyncClient, script: Script, path: str, tmp_path: Path) -> None:
    script.write({"when": "dragon", "gate": str(tmp_path / "gate"), "reply": "x"})
    asking = asyncio.create_task(api.post(path, json=ASKED[path]))

    async def is_there() -> bool:
        return bool((await api.get("/api/jobs")).json()["jobs"])

    await eventually(is_there)
    await api.post("/api/jobs/cancel", params={"status": ["queued", "processing"]})
    assert ((await asking).status_code, (await asking).json()["error"]["code"]) == (400, "cancelled")


async def test_a_stream_tells_place_and_forecast_before_the_first_token(
    config: Config, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "ALIVE_S", 0.0)
    async with serving(config, follow_timings=Timings(heartbeat_s=0.05)) as api:
        await api.post("/api/jobs", json={"content": "before"})
        async with api.stream("POST", CHAT, json=ASKED[CHAT] | {"stream": True}) as stream:
            lines = stream.aiter_lines()
            told: list[str] = []
            while not any(line.startswith(": queued: place 2") for line in told):
                told.append(await anext(lines))
            # Some clients count events alone.
            while not any('"delta":{},' in line for line in told):
                told.append(await anext(lines))
    assert "retry" not in "".join(told)
    assert not any(line.startswith("id:") for line in told)


async def test_everything_that_clients_send_by_default_is_taken(api: httpx.AsyncClient, script: Script) -> None:
    script.write(DRAGON)
    common = {
        "model": "smollm2",
        "n": 1,
        "store": False,
        "metadata": {"a": "b"},
        "user": "u",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "parallel_tool_calls": True,
        "top_logprobs": 0,
        "logprobs": None,
        "service_tier": "auto",
        "temperature": 1,
        "top_p": 1,
        "seed": -1,
        "stop": None,
        "unknown": {"x": 1},
    }
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "A "}, {"type": "text", "text": "dragon?"}]},
    ]
    more = {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": False}, "tools": []}
    answer = await api.post(CHAT, json=common | {"messages": messages, "max_completion_tokens": 100, **more})
    assert answer.json()["choices"][0]["message"]["content"] == REPLY
    (job,) = (await api.get("/api/jobs")).json()["jobs"]
    assert (job["user_input"], job["system_prompt"]) == ("A dragon?", "Be brief.")
    assert job["parameters"]["reasoning_effort"] == "none"
    assert job["parameters"]["chat_template_kwargs"] == {"enable_thinking": False}
    assert (job["parameters"]["max_tokens"], job["parameters"]["seed"]) == (100, 2**32 - 1)
    given = {"input": messages, "background": False, "include": None, "reasoning": {"effort": None}, "text": {}}
    answer = await api.post(RESPONSES, json=common | given | {"truncation": "auto", "max_output_tokens": None})
    assert answer.json()["output"][0]["content"][0] == {
        "type": "output_text",
        "text": REPLY,
        "annotations": [],
        "logprobs": [],
    }
    assert answer.json()["error"] is None
    # Without a model, and under the path that nginx serves.
    assert (await api.post(f"/chat{CHAT}", json={"messages": messages})).status_code == 200


@pytest.mark.parametrize(
    ("given", "effort"), [("minimal", "low"), ("xhigh", "high"), ("max", "high"), ("medium", "medium"), (700, 700)]
)
async def test_every_effort_has_its_place(api: httpx.AsyncClient, given: Any, effort: Any) -> None:
    await api.post(CHAT, json=ASKED[CHAT] | {"reasoning_effort": given})
    await api.post(RESPONSES, json=ASKED[RESPONSES] | {"reasoning": {"effort": given, "summary": "auto"}})
    for job in (await api.get("/api/jobs")).json()["jobs"]:
        assert job["parameters"]["reasoning_effort"] == effort


@pytest.mark.parametrize(("tier", "priority"), [("flex", "batch"), ("priority", "interactive"), ("auto", "normal")])
async def test_a_service_tier_is_a_class(api: httpx.AsyncClient, tier: str, priority: str) -> None:
    await api.post(CHAT, json=ASKED[CHAT] | {"service_tier": tier})
    (job,) = (await api.get("/api/jobs")).json()["jobs"]
    assert job["priority"] == priority


async def test_a_reply_is_held_to_a_schema_in_each_form(api: httpx.AsyncClient) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    named = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    assert (await api.post(CHAT, json=ASKED[CHAT] | {"response_format": named})).status_code == 200
    flat = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}
    answer = await api.post(RESPONSES, json=ASKED[RESPONSES] | {"text": flat})
    assert answer.json()["text"]["format"]["schema"] == schema
    for job in (await api.get("/api/jobs")).json()["jobs"]:
        assert job["parameters"]["response_format"]["type"] == "json_schema"


IMAGE = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]


@pytest.mark.parametrize(
    ("path", "wrong", "param"),
    [
        (CHAT, {"n": 2}, "n"),
        (TEXT, {"best_of": 2}, "best_of"),
        (CHAT, {"logit_bias": {"50256": -100}}, "logit_bias"),
        (CHAT, {"logprobs": True}, "logprobs"),
        (CHAT, {"logprobs": False, "top_logprobs": 3}, "top_logprobs"),
        (TEXT, {"logprobs": 2}, "logprobs"),
        (TEXT, {"suffix": "end"}, "suffix"),
        (TEXT, {"prompt": ["a", "b"]}, "prompt"),
        (TEXT, {"prompt": ""}, "prompt"),
        (CHAT, {"audio": {"voice": "alloy"}}, "audio"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities[1]"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        (CHAT, {"functions": [{"name": "f"}]}, "functions"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "system", "content": "x"}]}, "messages"),
        (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [USER, {"role": "tool", "tool_call_id": "c", "content": "x"}]}, "messages[1]"),
        (CHAT, {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages[1]"),
        (CHAT, {"messages": [{"role": "user", "content": IMAGE}]}, "messages[0].content[1]"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (CHAT, {"messages": "x"}, "messages"),
        (CHAT, {"temperature": "hot"}, "temperature"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"response_format": {"type": "yaml"}}, "response_format.type"),
        (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0]"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "../x"}]}, "input[0].id"),
        (RESPONSES, {"conversation": "conv_1"}, "conversation"),
        (RESPONSES, {"prompt": {"id": "pmpt_1"}}, "prompt"),
        (RESPONSES, {"tools": [{"type": "web_search"}]}, "tools"),
        (RESPONSES, {"input": []}, "input"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_its_field(
    api: httpx.AsyncClient, path: str, wrong: dict[str, Any], param: str
) -> None:
    answer = await api.post(path, json=ASKED[path] | wrong)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert len(error["message"]) > 10
    assert (await api.get("/api/jobs")).json()["jobs"] == []


async def test_errors_have_openais_shape_under_v1_and_nowhere_else(api: httpx.AsyncClient) -> None:
    async def error(method: str, path: str, **more: Any) -> tuple[int, str]:
        answer = await api.request(method, path, **more)
        assert answer.json().keys() == {"error"}, answer.text
        return answer.status_code, answer.json()["error"]["code"]

    for prefix in ("/v1", "/chat/v1"):
        assert await error("GET", f"{prefix}/assistants") == (404, "not_found")
        assert await error("POST", f"{prefix}/images/generations", json={}) == (404, "not_found")
        assert await error("GET", f"{prefix}/chat/completions") == (405, "method_not_allowed")
        assert await error("POST", f"{prefix}/chat/completions", content=b"{") == (415, "unsupported_media_type")
        json_type = {"Content-Type": "application/json"}
        assert await error("POST", f"{prefix}/chat/completions", content=b"{", headers=json_type) == (400, "bad_input")
        assert await error("GET", f"{prefix}/models", headers={"Authorization": "Bearer x"}) == (401, "invalid_api_key")
        host = {"Host": "a b"}
        assert await error("POST", f"{prefix}/chat/completions", json={}, headers=host) == (400, "bad_input")
        assert await error("GET", f"{prefix}/models/none") == (404, "model_not_found")
        assert await error("GET", f"{prefix}/responses/resp_7") == (404, "not_found")
    assert (await api.get("/api/nothing")).json()["type"] == "about:llamalith/not-found"


async def test_a_full_queue_is_a_429_that_says_when_to_come_again(config: Config) -> None:
    async with serving(msgspec.structs.replace(config, max_queued=1)) as api:
        await api.post("/api/jobs", json={"content": "x"})
        answer = await api.post(CHAT, json=ASKED[CHAT])
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
        assert 0 < int(answer.headers["retry-after"]) <= 60


async def test_two_thousand_messages_are_one_call(api: httpx.AsyncClient) -> None:
    messages = [{"role": ("user", "assistant")[n % 2], "content": f"{n}"} for n in range(1999)]
    answer = await api.post(CHAT, json={"messages": [{"role": "system", "content": "s"}, *messages]})
    assert answer.status_code == 200
    (conversation,) = (await api.get("/api/conversations")).json()["conversations"]
    assert conversation["n_turns"] == 1


async def test_calls_that_go_on_from_one_place_at_once_run_beside_each_other(
    api: httpx.AsyncClient, script: Script, tmp_path: Path
) -> None:
    first = (await api.post(CHAT, json={"messages": [{"role": "system", "content": "s"}, USER]})).json()
    reply = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
    gate = tmp_path / "gate"
    script.write({"when": "then", "gate": str(gate), "reply": "x"})

    def ask(n: int) -> asyncio.Task[httpx.Response]:
        then = {"role": "user", "content": f"And then, {n}?"}
        body = {"messages": [{"role": "system", "content": "s"}, USER, reply, then]}
        return asyncio.create_task(api.post(CHAT, json=body))

    asking = [ask(n) for n in range(3)]

    async def all_run() -> bool:
        jobs = (await api.get("/api/jobs")).json()["jobs"]
        return [job["status"] for job in jobs].count("processing") == 3

    await eventually(all_run)
    gate.touch()
    counts = [(await one).json()["usage"]["prompt_tokens"] for one in asking]
    said = f"<system>s</system><user>A dragon?</user><assistant>{reply['content']}</assistant>"
    assert counts == [len(f"{said}<user>And then, 0?</user>")] * 3


async def test_a_system_prompt_in_the_middle_stands_where_it_was_sent(api: httpx.AsyncClient) -> None:
    first = (await api.post(CHAT, json={"messages": [USER]})).json()
    reply = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
    late = {"role": "system", "content": "Rhyme."}
    for rest in ([late, USER], [USER, late]):
        answer = (await api.post(CHAT, json={"messages": [USER, reply, *rest]})).json()
        said = "".join(f"<{m['role']}>{m['content']}</{m['role']}>" for m in [USER, reply, *rest])
        assert answer["usage"]["prompt_tokens"] == len(said)


async def test_a_page_of_this_site_may_call_with_its_session(config: Config, script: Script) -> None:
    async with serving(config) as api, working_in_process(config, script):
        await log_in(api)
        assert (await api.post(f"/chat{CHAT}", json=ASKED[CHAT])).status_code == 200
        foreign = {"Origin": "https://evil.example"}
        answer = await api.post(f"/chat{CHAT}", json=ASKED[CHAT], headers=foreign)
        assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")


async def test_models_have_what_clients_of_llama_server_read(api: httpx.AsyncClient) -> None:
    (model,) = (await api.get("/v1/models")).json()["data"]
    assert model == {
        "id": "smollm2",
        "object": "model",
        "created": 0,
        "owned_by": "llamalith",
        "status": {"value": "unloaded"},
    }
    await api.post(CHAT, json=ASKED[CHAT])

    async def is_loaded() -> bool:
        return bool((await api.get("/v1/models/smollm2")).json()["status"]["value"] == "loaded")

    await eventually(is_loaded)
    assert (await api.post("/v1/models/unload", json={"model": "smollm2"})).json() == {"success": True}
    assert (await api.post("/v1/models/load", json={"model": "none"})).status_code == 404
