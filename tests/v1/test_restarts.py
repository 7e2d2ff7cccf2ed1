"""A reply that is begun anew while an OpenAI client reads it: what the client has, it cannot give back."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from llamalith_app.web.openai.told import Said
from tests.settle import eventually
from tests.worker.conftest import Script

REPLY = "Green, old, and fond of tea."
CALL = {"messages": [{"role": "user", "content": "A dragon?"}], "stream": True}


@pytest.mark.parametrize(
    ("again", "differs"),
    [
        (["Green, old"], False),
        (["Gre", "en, o", "ld and tea"], False),
        (["Green, old, and", " tea"], False),
        (["Blue"], True),
        (["Green, new, and"], True),
    ],
)
def test_of_a_text_that_begins_anew_only_what_goes_on_is_new(again: list[str], differs: bool) -> None:
    said = Said()
    assert said.add("Green, old") == "Green, old"
    said.restart()
    told = [said.add(text) for text in (*again, "!")]
    assert said.differs is differs
    if not differs:
        assert "".join(told) == "".join(again)[len("Green, old") :] + "!"


def texts(stream: str) -> tuple[str, list[dict[str, Any]]]:
    """All of the reply, and the errors."""
    found = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"].get("content", "") for one in found for choice in one.get("choices", [])]
    return "".join(deltas), [one["error"] for one in found if "error" in one]


async def test_the_same_text_is_told_once(api: httpx.AsyncClient, script: Script, tmp_path: Path) -> None:
    dies = {"after": 6, "signal": signal.SIGKILL.value, "once": str(tmp_path / "died"), "goes_on": False}
    script.write({"when": "dragon", "reply": REPLY, **dies})
    answer = await api.post("/v1/chat/completions", json=CALL)
    assert texts(answer.text) == (REPLY, [])
    (job,) = (await api.get("/api/jobs")).json()["jobs"]
    assert job["attempt"] == 2


async def read_while_begun_anew(api: httpx.AsyncClient, script: Script, folder: Path, reply: str) -> str:
    """The stream of a call whose first attempt wrote the beginning of REPLY and died, and whose second writes this."""
    gate = folder / "gate"
    dies = {
        "after": 6,
        "signal": signal.SIGKILL.value,
        "once": str(folder / "died"),
        "gate": str(gate),
        "goes_on": False,
    }
    script.write({"when": "dragon", "reply": REPLY, **dies})
    async with api.stream("POST", "/v1/chat/completions", json=CALL) as stream:
        lines, seen = stream.aiter_lines(), ""
        while "Green" not in texts(seen)[0]:
            seen += await anext(lines) + "\n"
        script.write({"when": "dragon", "reply": reply, "goes_on": False})
        gate.touch()
        return seen + "\n".join([line async for line in lines])


async def test_another_text_ends_the_stream_and_the_same_call_gets_it_whole(
    api: httpx.AsyncClient, script: Script, tmp_path: Path
) -> None:
    text, (error,) = texts(await read_while_begun_anew(api, script, tmp_path, "Blue, and shy."))
    assert (REPLY.startswith(text), error["code"]) == (True, "restarted")
    again = await api.post("/v1/chat/completions", json=CALL)
    assert texts(again.text) == ("Blue, and shy.", [])
    (job,) = (await api.get("/api/jobs")).json()["jobs"]
    assert job["result"] == "Blue, and shy."


async def test_a_shorter_text_ends_the_stream_too(api: httpx.AsyncClient, script: Script, tmp_path: Path) -> None:
    _, errors = texts(await read_while_begun_anew(api, script, tmp_path, "Gr"))
    assert [error["code"] for error in errors] == ["restarted"]


async def test_a_whole_answer_is_of_the_last_attempt(api: httpx.AsyncClient, script: Script, tmp_path: Path) -> None:
    dies = {"after": 6, "signal": signal.SIGKILL.value, "once": str(tmp_path / "died"), "goes_on": False}
    script.write({"when": "dragon", "reply": REPLY, **dies})
    asking = asyncio.create_task(api.post("/v1/chat/completions", json=CALL | {"stream": False}))

    async def has_died() -> bool:
        return (tmp_path / "died").exists()

    await eventually(has_died)
    assert (await asking).json()["choices"][0]["message"]["content"] == REPLY
