"""OpenAI's Python package, unmodified."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.worker.conftest import Script

USER = {"role": "user", "content": "Describe a dragon."}
REPLY = {"when": "dragon", "reply": "Green, old, and fond of tea."}


async def test_it_lists_the_models_and_reads_one(client: Any) -> None:
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == ["smollm2"]
    assert (await client.models.retrieve("smollm2")).owned_by == "llamalith"


async def test_a_chat_completion_is_a_job_like_every_other(client: Any, api: httpx.AsyncClient, script: Script) -> None:
    script.write(REPLY)
    answer = await client.chat.completions.create(model="smollm2", messages=[USER], temperature=0)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (REPLY["reply"], "stop")
    assert answer.usage.completion_tokens > 0
    job = (await api.get(f"/api/jobs/{answer.id.removeprefix('chatcmpl-')}")).json()
    assert (job["user_input"], job["result"], job["status"]) == (USER["content"], REPLY["reply"], "done")
    assert (await api.get("/api/conversations", params={"source": "v1"})).json()["conversations"][0]["n_turns"] == 1


async def test_a_stream_brings_the_same_text_and_its_tokens(client: Any, script: Script) -> None:
    script.write(REPLY)
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model="smollm2", messages=[USER], stream=True, stream_options={"include_usage": True}
        )
    ]
    *said, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == REPLY["reply"]
    assert [chunk.choices[0].finish_reason for chunk in said] == [None] * (len(said) - 1) + ["stop"]
    assert said[0].choices[0].delta.role == "assistant"
    assert (last.choices, last.usage.total_tokens > 0) == ([], True)


async def test_a_history_that_is_sent_back_goes_on_in_its_conversation(
    client: Any, api: httpx.AsyncClient, script: Script
) -> None:
    script.write(REPLY, {"when": "eat", "reply": "Scones."})
    system = {"role": "system", "content": "You are brief."}
    first = await client.chat.completions.create(model="smollm2", messages=[system, USER])
    reply = {"role": "assistant", "content": first.choices[0].message.content}
    again = {"role": "user", "content": "What does it eat?"}
    second = await client.chat.completions.create(model="smollm2", messages=[system, USER, reply, again])
    assert second.choices[0].message.content == "Scones."
    (conversation,) = (await api.get("/api/conversations")).json()["conversations"]
    assert conversation["n_turns"] == 2
    messages = (await api.get(f"/api/conversations/{conversation['conversation_id']}/messages")).json()["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]


async def test_an_error_is_one_that_the_package_knows(openai: Any, client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-4o", messages=[USER])
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model="smollm2", messages=[USER], n=2)
    assert refused.value.param == "n"
    with pytest.raises(openai.AuthenticationError) as unknown:
        await client.with_options(api_key="wrong").models.list()
    assert unknown.value.code == "invalid_api_key"
