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
from llamalith_app.streams.wire import Entry
from llamalith_app.web import sse
from llamalith_app.web.transcript import FINAL, MAX_BATCH, STORED, Cursor, JobEvent, Transcript
from tests.streams.sse import Event, Heard

NOW = datetime(2026, 11, 24, tzinfo=UTC)


def ended(status: Any = "done", result: str | None = None, attempt: int = 1) -> Job:
    return msgspec.convert(
        {
            **dict.fromkeys(Job.__struct_fields__),
            "id": 1,
            "conversation_id": "c",
            "turn_id": 1,
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


def delta(attempt: int, n: int, text: str, offset: int, first_attempt: int | None = None) -> Entry:
    data = msgspec.json.encode(Delta(job_id=1, text=text, offset=offset, tokens=[]))
    return Entry(attempt, n, "delta", data, first_attempt or attempt)


def restart(attempt: int, n: int, first_attempt: int | None = None) -> Entry:
    return Entry(
        attempt, n, "restart", msgspec.json.encode(Restart(job_id=1, attempt=attempt)), first_attempt or attempt
    )


def parsed(event: JobEvent) -> Event:
    """As a client of Server-Sent Events has it."""
    fields = dict(line.split(": ", 1) for line in sse.frames([event]).decode().strip().split("\n"))
    return Event(fields["event"], fields["id"], msgspec.json.decode(fields["data"]))


class Client:
    """Reads a transcript as a stream does, and disconnects and resumes where the test says so."""

    def __init__(self) -> None:
        self.heard = Heard()
        self.cursor: Cursor | None = None

    def read(self, transcript: Transcript) -> None:
        sent, self.cursor = transcript.events_after(self.cursor)
        for event in sent:
            self.heard.take(parsed(event))

    def read_all(self, transcript: Transcript) -> None:
        while self.heard.final is None:
            self.read(transcript)

    def come_again(self) -> None:
        if self.heard.last_id:
            attempt, n = self.heard.last_id.split("-")
            self.cursor = Cursor(int(attempt), int(n))


class Source:
    """A worker's attempts in Redis, and the transcript that a process makes of them, with losses."""

    def __init__(self) -> None:
        self.attempt, self.n, self.text = 1, 0, ""
        self.first_attempt = 1
        self.stream: list[Entry] = []
        self.transcript = Transcript(1)
        self.is_cut_off = False

    def publish(self, *entries: Entry) -> None:
        self.stream += entries
        for entry in entries:
            if not self.is_cut_off and not self.transcript.add(entry):
                self.catch_up()

    def catch_up(self) -> None:
        for entry in self.stream:
            if not self.transcript.add(entry):
                self.transcript.mark_incomplete(entry.attempt)

    def write(self, text: str) -> None:
        self.n += 1
        self.text += text
        self.publish(delta(self.attempt, self.n, text, len(self.text) - len(text), self.first_attempt))

    def begin_again(self) -> None:
        self.attempt, self.n, self.text = self.attempt + 1, 1, ""
        self.stream, self.first_attempt = [], self.attempt
        self.publish(restart(self.attempt, 1))

    def go_on(self) -> None:
        """As a later attempt does where Redis has all of the text."""
        deltas = [msgspec.json.decode(entry.data).get("text", "") for entry in self.stream]
        if self.stream and "".join(deltas) == self.text:
            self.attempt += 1
        else:
            self.begin_again()

    def publish_whole_again(self) -> None:
        """As the writer does that saw its stream gone."""
        whole = delta(self.attempt, self.n + 2, self.text, 0, self.first_attempt)
        self.stream = []
        self.publish(restart(self.attempt, self.n + 1, self.first_attempt), whole)
        self.n += 2

    def do(self, what: str) -> None:
        if what == "attempt":
            self.begin_again()
        elif what == "go on":
            self.go_on()
        elif what == "wipe":
            self.stream = []
        elif what == "whole":
            self.publish_whole_again()
        elif what == "cut off":
            self.is_cut_off = True
        elif what == "connected":
            self.is_cut_off = False
            self.catch_up()
        elif what == "new process":
            self.transcript = Transcript(1)
            self.catch_up()
        else:
            self.write(what)


happenings = st.lists(
    st.sampled_from(
        ["a", "bc", "ü🐉", "attempt", "go on", "wipe", "whole", "cut off", "connected", "new process", "read", "again"]
    ),
    max_size=40,
)


@given(happenings, st.booleans())
def test_whatever_happens_every_reader_has_the_stored_reply_in_the_end(what: list[str], catches_up: bool) -> None:
    source, eager, late = Source(), Client(), Client()
    for one in what:
        if one == "read":
            late.read(source.transcript)
        elif one == "again":
            eager.come_again()
            late.come_again()
        else:
            source.do(one)
        eager.read(source.transcript)
    if catches_up:
        source.catch_up()
    source.transcript.finish(ended(result=source.text, attempt=source.attempt))
    newcomer = Client()
    for client in (eager, late, newcomer):
        client.read_all(source.transcript)
        assert client.heard.text == source.text
        assert client.heard.kinds.count("done") == 1
    assert "restart" not in newcomer.heard.kinds[:1] or newcomer.heard.kinds == ["done"]


def test_a_reader_that_comes_again_at_any_place_gets_exactly_what_it_lacks() -> None:
    transcript = Transcript(1)
    for n in range(1, 6):
        assert transcript.add(delta(1, n, f"{n}", n - 1))
    transcript.finish(ended(result="12345 and what only the record has"))
    sent, _ = transcript.events_after(None)
    for kept in range(1, len(sent)):
        heard = Heard()
        for event in sent[:kept]:
            heard.take(parsed(event))
        client = Client()
        client.heard = heard
        client.come_again()
        client.read_all(transcript)
        assert client.heard.text == "12345 and what only the record has"
        assert "restart" not in client.heard.kinds


def test_an_attempt_that_goes_on_takes_nothing_back_wherever_a_reader_stood() -> None:
    transcript, early = Transcript(1), Client()
    entries = [
        delta(1, 1, "a", 0),
        delta(1, 2, "b", 1),
        delta(2, 3, "c", 2, first_attempt=1),
        delta(4, 4, "d", 3, first_attempt=1),
    ]
    for entry in entries:
        assert transcript.add(entry)
        early.read(transcript)
        early.come_again()
    assert transcript.add(delta(1, 3, "of one that was given up", 2)), "stale"
    transcript.finish(ended(result="abcde", attempt=5))
    early.read_all(transcript)
    assert early.heard.kinds == ["delta"] * 5 + ["done"]
    assert early.heard.text == "abcde"
    for cursor, text in ((Cursor(2, 3), "de"), (Cursor(1, 2), "cde")):
        sent, _ = transcript.events_after(cursor)
        assert "".join(parsed(event).data.get("text", "") for event in sent) == text


def test_text_that_is_not_the_stored_reply_is_taken_back() -> None:
    transcript, client = Transcript(1), Client()
    transcript.add(delta(1, 1, "another", 0))
    client.read(transcript)
    transcript.finish(ended(result="the reply"))
    client.read_all(transcript)
    assert client.heard.kinds == ["delta", "restart", "delta", "done"]
    assert client.heard.text == "the reply"


def test_what_is_lost_is_missed_once_and_not_at_every_later_entry() -> None:
    transcript = Transcript(1)
    assert transcript.add(delta(1, 1, "a", 0))
    assert not transcript.add(delta(1, 3, "c", 2))
    transcript.mark_incomplete(1)
    assert transcript.add(delta(1, 4, "d", 3))
    assert transcript.last == (1, 1)
    assert transcript.add(restart(1, 5))
    assert transcript.add(delta(1, 6, "abcd", 0))
    assert transcript.last == (1, 6)


@pytest.mark.parametrize("cursor", [Cursor(1, 3), Cursor(2, 1), Cursor(7, STORED), Cursor(0, 0)])
def test_a_cursor_of_another_time_means_the_whole_again(cursor: Cursor) -> None:
    transcript = Transcript(1)
    transcript.finish(ended(result="the reply", attempt=1))
    sent, _ = transcript.events_after(cursor)
    assert [parsed(event).kind for event in sent] == ["restart", "delta", "done"]


def test_a_reader_with_the_whole_reply_gets_the_last_event_alone() -> None:
    transcript = Transcript(1)
    transcript.finish(ended(result="the reply"))
    sent, cursor = transcript.events_after(Cursor(1, STORED))
    assert [parsed(event).kind for event in sent] == ["done"]
    assert cursor == (1, FINAL)


def test_a_failed_job_takes_nothing_back() -> None:
    transcript = Transcript(1)
    transcript.finish(ended("error", "it failed"))
    sent, _ = transcript.events_after(Cursor(1, 3))
    assert [parsed(event).kind for event in sent] == ["error"]


def test_one_write_is_bounded() -> None:
    transcript = Transcript(1)
    for n in range(1, 3 * MAX_BATCH):
        transcript.add(delta(1, n, "x", n - 1))
    sent, cursor = transcript.events_after(None)
    assert len(sent) == MAX_BATCH
    assert cursor == (1, MAX_BATCH)


def test_one_attempts_deltas_are_passed_on_and_only_the_last_is_decoded() -> None:
    transcript, client = Transcript(1), Client()
    odd = Entry(1, 1, "delta", b"decoding this would raise", 1)
    assert transcript.add(odd)
    assert transcript.add(delta(1, 2, "b", 1))
    sent, client.cursor = transcript.events_after(None)
    assert sent[0].data == odd.data
    transcript.finish(ended(result="abc"))
    client.heard.text = "ab"
    client.read_all(transcript)
    assert client.heard.kinds == ["delta", "done"]
    assert client.heard.text == "abc"


def test_deltas_of_several_attempts_are_compared_from_the_beginning() -> None:
    transcript, client = Transcript(1), Client()
    # Attempt 1 was given up and published its second delta too late; attempt 2 wrote another second one.
    for entry in (delta(1, 1, "a", 0), delta(1, 2, "X", 1), delta(2, 3, "c", 2, first_attempt=1)):
        assert transcript.add(entry)
    client.read(transcript)
    transcript.finish(ended(result="abc", attempt=2))
    client.read_all(transcript)
    assert client.heard.kinds == ["delta"] * 3 + ["restart", "delta", "done"]
    assert client.heard.text == "abc"


@pytest.mark.parametrize("data", [b"no JSON", b"{}", b'{"text": "\xff"}'])
def test_a_last_delta_that_cannot_be_decoded_is_taken_back(data: bytes) -> None:
    transcript = Transcript(1)
    assert transcript.add(Entry(1, 1, "delta", data, 1))
    _, cursor = transcript.events_after(None)
    transcript.finish(ended(result="the reply"))
    sent, _ = transcript.events_after(cursor)
    assert [parsed(event).kind for event in sent] == ["restart", "delta", "done"]


def test_a_lane_has_the_job_before_each_id_and_progress_has_none() -> None:
    events = [JobEvent(0, 0, "progress", b"{}"), JobEvent(2, 0, "restart", b"{}")]
    assert sse.frames(events, b"7.") == (b"event: progress\ndata: {}\n\n" + b"id: 7.2-0\nevent: restart\ndata: {}\n\n")
