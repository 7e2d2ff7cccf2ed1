"""The scheduler over the fake runner, in one thread: any order of events, and the rules one by one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from llamalith_app.engine.loop import fill_slot
from llamalith_app.engine.messages import Advance, Refused
from llamalith_app.engine.runner_protocol import SampleFailed
from llamalith_app.engine.scheduler import Admission, Scheduler
from llamalith_app.engine.sequence import Sequence, SlotState
from llamalith_app.engine.text import ReplyText
from tests.engine.conftest import sampling
from tests.fake_engine import FakeRunner

N_CTX, N_CHUNK = 40, 8


class Stepping:
    """A scheduler and a runner, driven as the child drives them."""

    def __init__(self, n_slots: int, rules: list[dict[str, Any]] | None = None, *, can_share: bool = True) -> None:
        self.runner = FakeRunner(lambda: rules or [], n_ctx=N_CTX, n_slots=n_slots, can_share=can_share)
        self.scheduler = Scheduler(self.runner)
        self.results: list[Advance | Refused] = []

    def submit(self, sequence_id: int, prompt: str, max_tokens: int = 5, state: SlotState | None = None) -> None:
        tokens = self.runner.tokenize(prompt)
        self.runner.begin(sequence_id, sampling(), "", None, tokens, ())
        self.scheduler.submit(Sequence(sequence_id, tokens, max_tokens, ReplyText([]), state=state))

    def admit(self) -> list[Admission]:
        admissions = self.scheduler.admit()
        for admission in admissions:
            fill_slot(self.scheduler, self.runner, admission)
        return admissions

    def step(self) -> list[Advance | Refused]:
        self.admit()
        plan = self.scheduler.plan(N_CHUNK)
        assert len({work.slot for work in plan}) == len(plan)
        assert sum(len(work.tokens) for work in plan) <= N_CHUNK + len(plan)
        results = self.scheduler.apply(self.runner.evaluate(plan))
        self.results += results
        return results

    def run(self) -> None:
        while not self.scheduler.is_idle:
            self.step()

    def advances_of(self, sequence_id: int) -> list[Advance]:
        return [one for one in self.results if one.sequence_id == sequence_id and isinstance(one, Advance)]


heads = st.sampled_from(["", "a" * 20, "b" * 20, "a" * 30])
prompts = st.builds(lambda head, rest: (head + rest)[: N_CTX - 1], heads, st.text("ab", min_size=1, max_size=N_CTX))
"""Of which many begin alike."""


class AnyOrder(RuleBasedStateMachine):
    can_share = True

    def __init__(self) -> None:
        super().__init__()
        self.stepping = Stepping(n_slots=3, can_share=self.can_share)
        self.submitted: list[tuple[str, int]] = []

    @rule(prompt=prompts, max_tokens=st.integers(1, 20))
    def submit(self, prompt: str, max_tokens: int) -> None:
        self.stepping.submit(len(self.submitted), prompt, max_tokens)
        self.submitted.append((prompt, max_tokens))

    @rule(prompt=prompts, n_saved=st.integers(1, N_CTX))
    def submit_with_a_state(self, prompt: str, n_saved: int) -> None:
        held = list(prompt.encode())[:n_saved]
        state = SlotState(held, json.dumps(held).encode())
        self.stepping.submit(len(self.submitted), prompt, 5, state)
        self.submitted.append((prompt, 5))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if not self.submitted:
            return
        sequence_id = data.draw(st.integers(0, len(self.submitted) - 1))
        had_ended = any(one.finish for one in self.stepping.advances_of(sequence_id))
        advance = self.stepping.scheduler.cancel(sequence_id)
        assert (advance is None) == had_ended
        if advance is not None:
            self.stepping.results.append(advance)

    @rule()
    def step(self) -> None:
        self.stepping.step()

    @invariant()
    def slots_and_sequences_agree(self) -> None:
        self.stepping.scheduler.check_integrity()

    @invariant()
    def the_runner_holds_what_the_slot_table_says(self) -> None:
        slots = self.stepping.scheduler.slots.slots
        assert self.stepping.runner.held == [slot.tokens for slot in slots]

    def teardown(self) -> None:
        self.stepping.run()
        assert [slot.sequence_id for slot in self.stepping.scheduler.slots.slots] == [None] * 3
        for sequence_id, (prompt, max_tokens) in enumerate(self.submitted):
            advances = self.stepping.advances_of(sequence_id)
            written = bytes(token for one in advances for token in one.tokens).decode()
            assert hashlib.sha256(prompt.encode()).hexdigest().startswith(written)
            assert "".join(one.text for one in advances) == written
            assert [one.finish is not None for one in advances] == [False] * (len(advances) - 1) + [True]
            if advances[-1].finish == "length":
                assert len(written) == min(max_tokens, N_CTX - len(prompt))
            done = [one.prompt_done for one in advances]
            assert done == sorted(done)


class AnyOrderOfARecurrentModel(AnyOrder):
    can_share = False


ANY_ORDER = settings(max_examples=settings().max_examples // 2, stateful_step_count=40)
TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = ANY_ORDER
TestAnyOrderOfARecurrentModel = AnyOrderOfARecurrentModel.TestCase
TestAnyOrderOfARecurrentModel.settings = ANY_ORDER


def test_a_long_prompt_does_not_stall_the_tokens_of_others() -> None:
    stepping = Stepping(n_slots=2)
    stepping.submit(1, "short")
    stepping.step()
    stepping.submit(2, "long" * 8)
    for n_chunks in (1, 2, 3):
        results = {one.sequence_id: one for one in stepping.step()}
        decoded, prefilled = results[1], results[2]
        assert isinstance(decoded, Advance)
        assert len(decoded.tokens) == 1
        assert isinstance(prefilled, Advance)
        assert prefilled.prompt_done == n_chunks * N_CHUNK


def test_prefills_take_turns_and_the_rest_of_a_chunk_is_the_next_ones() -> None:
    stepping = Stepping(n_slots=2)
    stepping.submit(1, "a" * 20)
    stepping.submit(2, "b" * 10)
    read = [
        [(one.sequence_id, one.prompt_done) for one in stepping.step() if isinstance(one, Advance) and not one.tokens]
        for _ in range(3)
    ]
    assert read == [[(1, 8)], [(2, 8)], [(1, 16)]]
    assert sorted((work.sequence_id, len(work.tokens)) for work in stepping.scheduler.plan(N_CHUNK)) == [(1, 4), (2, 2)]


def test_four_prefills_have_each_at_least_half_of_an_equal_share() -> None:
    stepping = Stepping(n_slots=4)
    for number, length in enumerate((30, 3, 30, 30)):
        stepping.submit(number, "abcd"[number] * length)
    done = dict.fromkeys(range(4), 0)
    for _ in range(4):
        done |= {one.sequence_id: one.prompt_done for one in stepping.step() if isinstance(one, Advance)}
    assert sum(done.values()) >= 4 * N_CHUNK
    assert min(done[0], done[2], done[3]) >= 4 * N_CHUNK / 4 / 2
    assert done[1] == 3


def test_the_end_of_a_prompt_is_read_along() -> None:
    stepping = Stepping(n_slots=2)
    stepping.submit(1, "a" * (N_CHUNK + 2))
    stepping.admit()
    assert [len(work.tokens) for work in stepping.scheduler.plan(N_CHUNK, 1)] == [N_CHUNK]
    assert [len(work.tokens) for work in stepping.scheduler.plan(N_CHUNK, 2)] == [N_CHUNK + 2]


def test_a_prefix_in_the_making_is_waited_for_and_copied() -> None:
    stepping = Stepping(n_slots=3)
    head = "a" * 20
    stepping.submit(1, head + "b")
    stepping.submit(2, head + "c")
    stepping.run()
    assert stepping.advances_of(1)[-1].prompt_reused == 0
    assert stepping.advances_of(2)[-1].prompt_reused == len(head)
    assert stepping.advances_of(2)[-1].finish == "length"


def test_a_sequence_that_waits_for_a_prefix_goes_on_alone_when_the_other_one_is_cancelled() -> None:
    stepping = Stepping(n_slots=3)
    head = "a" * 20
    stepping.submit(1, head + "b")
    stepping.submit(2, head + "c")
    stepping.step()
    stepping.scheduler.cancel(1)
    stepping.run()
    assert stepping.advances_of(2)[-1].prompt_reused == N_CHUNK
    assert stepping.advances_of(2)[-1].finish == "length"


def test_what_is_restored_never_comes_between_a_copy_and_its_step() -> None:
    stepping = Stepping(n_slots=4)
    head, saved = "a" * 20, list(b"b" * 20)
    stepping.submit(1, head + "x", max_tokens=20)
    for _ in range(4):
        stepping.step()
    stepping.submit(2, head + "y")
    stepping.submit(3, "b" * 20 + "z", state=SlotState(saved, json.dumps(saved).encode()))
    assert [one.sequence.id for one in stepping.admit()] == [2]
    stepping.runner.evaluate(stepping.scheduler.plan(N_CHUNK))
    assert [one.sequence.id for one in stepping.admit()] == [3]


def test_a_state_that_cannot_be_cut_costs_no_prefix_that_stands() -> None:
    stepping = Stepping(n_slots=1, can_share=False)
    head = "a" * 20
    stepping.submit(1, head, max_tokens=1)
    stepping.run()
    saved = list(b"a" * 20 + b"thinking")
    stepping.submit(2, head + "b", state=SlotState(saved, json.dumps(saved).encode(), least_cut=N_CTX + 1))
    stepping.run()
    assert stepping.advances_of(2)[-1].prompt_reused == len(head)


def test_a_state_goes_where_the_beginning_of_it_stands() -> None:
    stepping = Stepping(n_slots=2)
    for number, prompt in enumerate(("b" * 30, "a" * 5)):
        stepping.submit(number, prompt, max_tokens=1)
        stepping.run()
    saved = list(b"a" * 30)
    stepping.submit(2, "a" * 33, state=SlotState(saved, json.dumps(saved).encode()))
    (admission,) = stepping.admit()
    assert (admission.assignment.n_reused, admission.assignment.evicted) == (30, [])
    assert [slot.tokens[:1] for slot in stepping.scheduler.slots.slots].count([ord("b")]) == 1


def test_a_reply_that_is_complete_already_ends_without_a_step() -> None:
    stepping = Stepping(n_slots=1)
    sequence = Sequence(1, stepping.runner.tokenize("prompt"), 3, ReplyText([]))
    ended = stepping.scheduler.resume(sequence, b"abc")
    assert ended is not None
    assert (ended.finish, ended.text, list(ended.tokens)) == ("length", "abc", [*b"abc"])
    assert (ended.prompt_tokens, ended.prompt_done, ended.prompt_reused) == (6, 6, 6)


def test_a_cancel_frees_the_slot_for_the_very_next_step() -> None:
    stepping = Stepping(n_slots=1)
    stepping.submit(1, "a" * 30)
    stepping.submit(2, "b")
    stepping.step()
    cancelled = stepping.scheduler.cancel(1)
    assert cancelled is not None
    assert (cancelled.finish, cancelled.prompt_done) == ("cancelled", N_CHUNK)
    assert [one.sequence_id for one in stepping.step()] == [2]


def test_a_waiting_sequence_can_be_cancelled() -> None:
    stepping = Stepping(n_slots=1)
    stepping.submit(1, "a")
    stepping.submit(2, "b")
    stepping.step()
    assert stepping.scheduler.cancel(2) is not None
    stepping.run()
    assert stepping.advances_of(2) == []
    assert stepping.advances_of(1)[-1].finish == "length"


def test_a_sequence_that_ends_leaves_its_slot_in_the_same_step() -> None:
    stepping = Stepping(n_slots=1)
    stepping.submit(1, "a", max_tokens=1)
    stepping.submit(2, "b", max_tokens=1)
    assert [one.sequence_id for one in stepping.step()] == [1]
    assert [one.sequence_id for one in stepping.step()] == [2]
    assert stepping.scheduler.is_idle


def test_a_full_slot_ends_the_sequence() -> None:
    stepping = Stepping(n_slots=1)
    stepping.submit(1, "a" * (N_CTX - 3), max_tokens=100)
    stepping.run()
    assert stepping.advances_of(1)[-1].finish == "length"
    assert sum(len(one.tokens) for one in stepping.advances_of(1)) == 3


def test_the_end_token_is_no_part_of_the_reply() -> None:
    stepping = Stepping(1, [{"when": "hi", "reply": "yo"}])
    stepping.submit(1, "hi")
    stepping.run()
    assert [token for one in stepping.advances_of(1) for token in one.tokens] == list(b"yo")
    assert stepping.advances_of(1)[-1].finish == "stop"


def test_a_failed_draw_ends_its_own_sequence_only() -> None:
    stepping = Stepping(n_slots=2)
    stepping.submit(1, "a")
    stepping.submit(2, "b")
    scheduler = stepping.scheduler
    stepping.admit()
    sampled = stepping.runner.evaluate(scheduler.plan(N_CHUNK))
    results = scheduler.apply([SampleFailed(1, "no"), *(one for one in sampled if one.sequence_id == 2)])
    assert results[0] == Refused(sequence_id=1, kind="grammar", reason="no")
    scheduler.check_integrity()
    stepping.run()
    assert stepping.advances_of(1) == []
    assert stepping.advances_of(2)[-1].finish == "length"


def test_a_slot_that_could_not_keep_its_tokens_reads_the_whole_prompt_again() -> None:
    stepping = Stepping(n_slots=1)
    stepping.submit(1, "abcdef", max_tokens=1)
    stepping.run()
    stepping.submit(2, "abcdefgh", max_tokens=1)
    (admission,) = stepping.scheduler.admit()
    assert admission.assignment.n_reused == len("abcdef")
    stepping.scheduler.correct_reuse(admission, stepping.runner.keep(admission.assignment.slot, 0))
    (work,) = stepping.scheduler.plan(N_CHUNK)
    assert (work.position, bytes(work.tokens)) == (0, b"abcdefgh")
