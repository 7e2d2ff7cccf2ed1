"""A reader of Server-Sent Events, as the HTML standard has it, and what such a reader makes of a job."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx

FINAL = ("done", "error", "cancelled")


class Event(NamedTuple):
    kind: str
    id: str
    """The newest id so far: an event without one does not change it."""
    data: Any


class Reader:
    """One open stream; iterate over `events()`. Comments are kept beside."""

    def __init__(self, answer: httpx.Response) -> None:
        self.answer = answer
        self.comments: list[str] = []
        self.retry = ""
        self.last_id = ""
        """Also one that came without an event."""

    async def events(self) -> AsyncIterator[Event]:
        fields: dict[str, str] = {}
        async for line in self.answer.aiter_lines():
            if line.startswith(":"):
                self.comments.append(line)
            elif line:
                name, _, value = line.partition(": ")
                fields[name] = value
            else:
                self.retry = fields.get("retry", self.retry)
                self.last_id = fields.get("id", self.last_id)
                if "data" in fields:
                    yield Event(fields["event"], self.last_id, json.loads(fields["data"]))
                fields = {}


@asynccontextmanager
async def reading(client: httpx.AsyncClient, path: str, after: str = "") -> AsyncIterator[Reader]:
    headers = {"Last-Event-ID": after} if after else {}
    async with client.stream("GET", path, headers=headers) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        yield Reader(answer)


async def read_all(client: httpx.AsyncClient, path: str, after: str = "") -> list[Event]:
    """To the stream's end."""
    async with reading(client, path, after) as reader:
        return [event async for event in reader.events()]


class Heard:
    """What a client that keeps the rules has of a job."""

    def __init__(self) -> None:
        self.text = ""
        self.thinking = ""
        self.tokens: list[int] = []
        self.last_id = ""
        self.kinds: list[str] = []
        self.final: dict[str, Any] | None = None

    def take(self, event: Event) -> None:
        assert self.final is None, f"{event} after the last event"
        self.last_id = event.id
        self.kinds.append(event.kind)
        if event.kind == "restart":
            self.text, self.thinking, self.tokens = "", "", []
        elif event.kind == "delta":
            assert event.data["offset"] == len(self.text)
            self.text += event.data["text"]
            self.tokens += event.data["tokens"]
        elif event.kind == "thinking":
            self.thinking += event.data["text"]
            self.tokens += event.data["tokens"]
        elif event.kind in FINAL:
            self.final = event.data


def heard(events: list[Event]) -> Heard:
    found = Heard()
    for event in events:
        found.take(event)
    return found
