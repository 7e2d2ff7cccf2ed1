"""What readers make of a job's events, whatever happened to these on their way. No Redis, no HTTP."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamalith_app.contracts.events import Delta, Restart
from llamalith_app.contracts.jobs import Job
from llamalith_app.streams.streams import Entry
from llamalith_app.web.transcript import FINAL, MAX_FRAMES, STORED, Cursor, Transcript
from tests.streams.sse import Event, Heard

NOW = datetime(2026, 11, 24, tzinfo=UTC)


def ended(status: Any = "done", result: str | None = None, attempt: int = 1) -> Job:
    return msgspec.convert(
        {
            **dict.fromkeys(Job.__struct_fields__),
            "id": 1,
            "conversation_id": "c",
            "user_input": "",
            "model": "m",
            "system_prompt": "",
            "status": status,
            "result": result,
            "created_at": NOW,
            "attempt": attempt,
            "max_attempts": 3,
            "omitted_messages": 0,
            "priority": "normal",
            "unenforced": [],
        },
        Job,
    )


def delta(attempt: int, n: int, text: str, offset: int, since: int | None = None) -> Entry:
    data = msgspec.json.encode(Delta(job_id=1, text=text, offset=offset, tokens=[]))
    return Entry(attempt, n, "delta", data, since or attempt)


def restart(attempt: int, n: int, since: int | None = None) -> Entry:
    return Entry(attempt, n, "restart", msgspec.json.encode(Restart(job_id=1, attempt=attempt)), since or attempt)


def parsed(frame: bytes) -> Event:
    fields = dict(line.split(": ", 1) for line in frame.decode().strip().split("\n"))
    return Event(fields["event"], fields["id"], msgspec.json.decode(fields["data"]))


class Client:
    """Reads a transcript as a stream does, and leaves and comes again where it is told to."""

    def __init__(self) -> None:
        self.heard = Heard()
        self.cursor: Cursor | None = None

    def read(self, transcript: Transcript) -> None:
        sent, self.cursor = transcript.read(self.cursor, b"")
        for frame in sent:
            self.heard.take(parsed(frame))

    def read_all(self, transcript: Transcript) -> None:
        while self.heard.final is None:
            self.read(transcript)

    def come_again(self) -> None:
        if self.heard.last_id:
            attempt, n = self.heard.last_id.split("-")
            self.cursor = Cursor(int(attempt), int(n))


class Source:
    """A worker's attempts, told to Redis, and what a process hears of it, with losses."""

    def __init__(self) -> None:
        self.attempt, self.n, self.text = 1, 0, ""
        self.since = 1
        self.stream: list[Entry] = []
        self.heard = Transcript(1)
        self.is_deaf = False

    def tell(self, *entries: Entry) -> None:
        self.stream += entries
        for entry in entries:
            if not self.is_deaf and not self.heard.take(entry):
                self.catch_up()

    def catch_up(self) -> None:
        for entry in self.stream:
            if not self.heard.take(entry):
                self.heard.give_up(entry.attempt)

    def write(self, text: str) -> None:
        self.n += 1
        self.text += text
        self.tell(delta(self.attempt, self.n, text, len(self.text) - len(text), self.since))

    def begin_again(self) -> None:
        self.attempt, self.n, self.text = self.attempt + 1, 1, ""
        self.stream, self.since = [], self.attempt
        self.tell(restart(self.attempt, 1))

    def go_on(self) -> None:
        """As a later attempt does where Redis has all of the text."""
        deltas = [msgspec.json.decode(entry.data).get("text", "") for entry in self.stream]
        if self.stream and "".join(deltas) == self.text:
            self.attempt += 1
        else:
            self.begin_again()

    def tell_whole_again(self) -> None:
        """As the writer does that saw its stream gone."""
        whole = delta(self.attempt, self.n + 2, self.text, 0, self.since)
        self.stream = []
        self.tell(restart(self.attempt, self.n + 1, self.since), whole)
        self.n += 2

    def do(self, what: str) -> None:
        if what == "attempt":
            self.begin_again()
        elif what == "go on":
            self.go_on()
        elif what == "wipe":
            self.stream = []
        elif what == "whole":
            self.tell_whole_again()
        elif what == "deaf":
            self.is_deaf = True
        elif what == "hearing":
            self.is_deaf = False
            self.catch_up()
        elif what == "new process":
            self.heard = Transcript(1)
            self.catch_up()
        else:
            self.write(what)


happenings = st.lists(
    st.sampled_from(
        ["a", "bc", "ü🐉", "attempt", "go on", "wipe", "whole", "deaf", "hearing", "new process", "read", "again"]
    ),
    max_size=40,
)


@given(happenings, st.booleans())
def test_whatever_happens_every_reader_has_the_stored_reply_in_the_end(what: list[str], is_heard: bool) -> None:
    source, eager, late = Source(), Client(), Client()
    for one in what:
        if one == "read":
            late.read(source.heard)
        elif one == "again":
            eager.come_again()
            late.come_again()
        else:
            source.do(one)
        eager.read(source.heard)
    if is_heard:
        source.catch_up()
    source.heard.finish(ended(result=source.text, attempt=source.attempt))
    newcomer = Client()
    for client in (eager, late, newcomer):
        client.read_all(source.heard)
        assert client.heard.text == source.text
        assert client.heard.kinds.count("done") == 1
    assert "restart" not in newcomer.heard.kinds[:1] or newcomer.heard.kinds == ["done"]


def test_a_reader_that_comes_again_at_any_place_gets_exactly_what_it_lacks() -> None:
    transcript = Transcript(1)
    for n in range(1, 6):
        assert transcript.take(delta(1, n, f"{n}", n - 1))
    transcript.finish(ended(result="12345 and what only the record has"))
    sent, _ = transcript.read(None, b"")
    for kept in range(1, len(sent)):
        heard = Heard()
        for frame in sent[:kept]:
            heard.take(parsed(frame))
        client = Client()
        client.heard = heard
        client.come_again()
        client.read_all(transcript)
        assert client.heard.text == "12345 and what only the record has"
        assert "restart" not in client.heard.kinds


def test_an_attempt_that_goes_on_takes_nothing_back_wherever_a_reader_stood() -> None:
    transcript, early = Transcript(1), Client()
    entries = [delta(1, 1, "a", 0), delta(1, 2, "b", 1), delta(2, 3, "c", 2, since=1), delta(4, 4, "d", 3, since=1)]
    for entry in entries:
        assert transcript.take(entry)
        early.read(transcript)
        early.come_again()
    assert transcript.take(delta(1, 3, "of one that was given up", 2)), "stale"
    transcript.finish(ended(result="abcde", attempt=5))
    early.read_all(transcript)
    assert early.heard.kinds == ["delta"] * 5 + ["done"]
    assert early.heard.text == "abcde"
    for cursor, text in ((Cursor(2, 3), "de"), (Cursor(1, 2), "cde")):
        sent, _ = transcript.read(cursor, b"")
        assert "".join(parsed(frame).data.get("text", "") for frame in sent) == text


def test_what_was_told_and_is_not_the_stored_reply_is_taken_back() -> None:
    transcript, client = Transcript(1), Client()
    transcript.take(delta(1, 1, "another", 0))
    client.read(transcript)
    transcript.finish(ended(result="the reply"))
    client.read_all(transcript)
    assert client.heard.kinds == ["delta", "restart", "delta", "done"]
    assert client.heard.text == "the reply"


def test_what_is_lost_is_missed_once_and_not_at_every_later_entry() -> None:
    transcript = Transcript(1)
    assert transcript.take(delta(1, 1, "a", 0))
    assert not transcript.take(delta(1, 3, "c", 2))
    transcript.give_up(1)
    assert transcript.take(delta(1, 4, "d", 3))
    assert transcript.last == (1, 1)
    assert transcript.take(restart(1, 5))
    assert transcript.take(delta(1, 6, "abcd", 0))
    assert transcript.last == (1, 6)


@pytest.mark.parametrize("cursor", [Cursor(1, 3), Cursor(2, 1), Cursor(7, STORED), Cursor(0, 0)])
def test_a_cursor_of_another_time_means_the_whole_again(cursor: Cursor) -> None:
    transcript = Transcript(1)
    transcript.finish(ended(result="the reply", attempt=1))
    sent, _ = transcript.read(cursor, b"")
    assert [parsed(frame).kind for frame in sent] == ["restart", "delta", "done"]


def test_who_has_the_whole_reply_gets_the_last_event_alone() -> None:
    transcript = Transcript(1)
    transcript.finish(ended(result="the reply"))
    sent, cursor = transcript.read(Cursor(1, STORED), b"")
    assert [parsed(frame).kind for frame in sent] == ["done"]
    assert cursor == (1, FINAL)


def test_a_failed_job_takes_nothing_back() -> None:
    transcript = Transcript(1)
    transcript.finish(ended("error", "it failed"))
    sent, _ = transcript.read(Cursor(1, 3), b"")
    assert [parsed(frame).kind for frame in sent] == ["error"]


def test_one_write_is_bounded() -> None:
    transcript = Transcript(1)
    for n in range(1, 3 * MAX_FRAMES):
        transcript.take(delta(1, n, "x", n - 1))
    sent, cursor = transcript.read(None, b"")
    assert len(sent) == MAX_FRAMES
    assert cursor == (1, MAX_FRAMES)
