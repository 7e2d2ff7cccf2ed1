"""OpenAI's Python package and its responses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.settle import eventually
from tests.worker.conftest import Script

REPLY = "Green, old, and fond of tea."
DRAGON = {"when": "dragon", "reply": REPLY}
THINKS = {"when": "dragon", "reply": f"<think>A dragon.</think>{REPLY}"}


async def test_a_response_is_a_job(client: Any, api: httpx.AsyncClient, script: Script) -> None:
    script.write(DRAGON)
    made = await client.responses.create(model="smollm2", input="Describe a dragon.", instructions="Be brief.")
    assert (made.output_text, made.status, made.error) == (REPLY, "completed", None)
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens > 0
    job = (await api.get(f"/api/jobs/{made.id.removeprefix('resp_')}")).json()
    assert (job["user_input"], job["system_prompt"]) == ("Describe a dragon.", "Be brief.")
    again = await client.responses.retrieve(made.id)
    assert (again.output_text, again.instructions) == (REPLY, "Be brief.")
    items = [item async for item in client.responses.input_items.list(made.id, order="asc")]
    assert [(item.role, item.content[0].text) for item in items] == [
        ("system", "Be brief."),
        ("user", "Describe a dragon."),
    ]


async def test_thinking_is_an_item_of_its_own(client: Any, script: Script) -> None:
    script.write(THINKS)
    made = await client.responses.create(model="smollm2", input="Describe a dragon.")
    thinking, message = made.output
    assert (thinking.type, thinking.content[0].text) == ("reasoning", "A dragon.")
    assert message.content[0].text == made.output_text == REPLY


async def test_a_stream_ends_as_the_response_stands(client: Any, script: Script) -> None:
    script.write(THINKS)
    events = [event async for event in await client.responses.create(model="smollm2", input="A dragon?", stream=True)]
    assert [event.type for event in events[:3]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert (thought, text, events[-1].type) == ("A dragon.", REPLY, "response.completed")
    assert events[-1].response.output_text == REPLY
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(set(numbers))


async def test_a_stream_resumes_behind_any_event(client: Any, script: Script) -> None:
    script.write(THINKS)
    made = await client.responses.create(model="smollm2", input="A dragon?", background=True, stream=True)
    events = [event async for event in made]
    whole = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    response_id, last = events[0].response.id, events[-1].sequence_number
    for after in range(0, last, 3):
        rest = [e async for e in await client.responses.retrieve(response_id, stream=True, starting_after=after)]
        known = "".join(
            event.delta[: max(0, len(event.delta) - max(0, event.sequence_number - after))]
            for event in events
            if event.type == "response.output_text.delta"
        )
        new = "".join(event.delta for event in rest if event.type == "response.output_text.delta")
        assert known + new == whole, after
        assert all(event.sequence_number > after for event in rest)
        assert rest[-1].type == "response.completed"


async def test_beyond_its_end_a_stream_cannot_resume(openai: Any, client: Any, script: Script) -> None:
    script.write(DRAGON)
    made = await client.responses.create(model="smollm2", input="A dragon?")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.retrieve(made.id, stream=True, starting_after=10_000)
    assert caught.value.param == "starting_after"


async def test_a_background_response_is_polled_and_cancelled(client: Any, script: Script, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    script.write({"when": "wait", "gate": str(gate), "reply": "x"}, DRAGON)
    made = await client.responses.create(model="smollm2", input="wait", background=True)
    assert made.status in ("queued", "in_progress")
    assert made.error is None
    cancelled = await client.responses.cancel(made.id)
    assert (cancelled.status, cancelled.error.code) == ("cancelled", "cancelled")
    assert (await client.responses.retrieve(made.id)).status == "cancelled"
    done = await client.responses.create(model="smollm2", input="A dragon?", background=True)

    async def is_done() -> bool:
        return bool((await client.responses.retrieve(done.id)).status == "completed")

    await eventually(is_done)


async def test_a_background_response_that_was_cut_is_completed_for_those_who_poll(client: Any, script: Script) -> None:
    script.write(DRAGON)
    cut = await client.responses.create(model="smollm2", input="A dragon?", max_output_tokens=5)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    polled = await client.responses.create(model="smollm2", input="A dragon?", max_output_tokens=5, background=True)

    async def is_done() -> bool:
        return bool((await client.responses.retrieve(polled.id)).status == "completed")

    await eventually(is_done)


async def test_a_response_goes_on_from_another_with_the_instructions_of_its_own(
    client: Any, api: httpx.AsyncClient, script: Script
) -> None:
    first = await client.responses.create(model="smollm2", input="A dragon?", instructions="Be brief.")
    second = await client.responses.create(model="smollm2", input="And then?", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert (await client.responses.retrieve(second.id)).previous_response_id == first.id
    job = (await api.get(f"/api/jobs/{second.id.removeprefix('resp_')}")).json()
    said = f"<user>A dragon?</user><assistant>{first.output_text}</assistant><user>And then?</user>"
    assert job["prompt_tokens"] == len(said)
    assert (
        job["conversation_id"]
        == (await api.get(f"/api/jobs/{first.id.removeprefix('resp_')}")).json()["conversation_id"]
    )


async def test_a_previous_response_that_cannot_be_gone_on_from_is_refused(
    openai: Any, client: Any, script: Script, tmp_path: Path
) -> None:
    script.write({"when": "wait", "gate": str(tmp_path / "gate"), "reply": "x"})
    running = await client.responses.create(model="smollm2", input="wait", background=True)
    await client.responses.cancel(running.id)
    deleted = await client.responses.create(model="smollm2", input="hello")
    await client.responses.delete(deleted.id)
    for previous in (running.id, deleted.id, "resp_999", "resp_x", "nothing"):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(model="smollm2", input="x", previous_response_id=previous)
        assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(deleted.id)


async def test_what_goes_on_from_a_response_that_is_not_there_yet_waits_for_it(
    client: Any, script: Script, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    script.write({"when": "then", "reply": "Tea."}, {"when": "wait", "gate": str(gate), "reply": "Green."})
    first = await client.responses.create(model="smollm2", input="wait", background=True)
    second = await client.responses.create(
        model="smollm2", input="And then?", background=True, previous_response_id=first.id
    )
    gate.touch()

    async def is_done() -> bool:
        return bool((await client.responses.retrieve(second.id)).status == "completed")

    await eventually(is_done)
    done = await client.responses.retrieve(second.id)
    assert done.usage.input_tokens == len("<user>wait</user><assistant>Green.</assistant><user>And then?</user>")


async def test_items_by_id_are_the_replies_that_they_name(openai: Any, client: Any, script: Script) -> None:
    first = await client.responses.create(model="smollm2", input="A dragon?")
    asked = [
        {"role": "user", "content": [{"type": "input_text", "text": "A dragon?"}]},
        {"type": "item_reference", "id": first.output[0].id},
        {"type": "message", "role": "user", "content": "And then?"},
    ]
    second = await client.responses.create(model="smollm2", input=asked)
    said = f"<user>A dragon?</user><assistant>{first.output_text}</assistant><user>And then?</user>"
    assert second.usage.input_tokens == len(said)
    with pytest.raises(openai.BadRequestError):
        await client.responses.create(model="smollm2", input=[*asked, {"type": "item_reference", "id": "msg_99"}])


async def test_what_is_not_to_be_stored_makes_a_conversation_of_its_own(client: Any, api: httpx.AsyncClient) -> None:
    first = await client.responses.create(model="smollm2", input="A dragon?")
    asked = [
        {"role": "user", "content": "A dragon?"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And then?"},
    ]
    second = await client.responses.create(model="smollm2", input=asked, store=False)
    assert second.store is False
    third = await client.responses.create(model="smollm2", input=asked)
    jobs = [(await api.get(f"/api/jobs/{made.id.removeprefix('resp_')}")).json() for made in (first, second, third)]
    assert jobs[0]["conversation_id"] == jobs[2]["conversation_id"] != jobs[1]["conversation_id"]
