"""Decides what each step evaluates and what came of it: plan -> evaluate -> apply. Pure, without a clock.

A step decodes one token of every running sequence and reads at most `n_chunk` prompt tokens, shared by those
that are in prefill, so that a long prompt never stalls the others for longer than a chunk takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import NamedTuple

from llamalith_app.engine.messages import Advance, FinishReason, Refused
from llamalith_app.engine.sequence import Sequence
from llamalith_app.engine.slots import SlotTable
from llamalith_app.engine.steps import Sampled, SampleFailed, Work


class Admission(NamedTuple):
    sequence: Sequence
    slot: int
    n_reused: int


class Scheduler:
    def __init__(
        self,
        *,
        n_slots: int,
        n_ctx: int,
        n_chunk: int,
        piece: Callable[[int], bytes],
        is_end: Callable[[int], bool],
    ) -> None:
        self.slots = SlotTable(n_slots)
        self._n_ctx = n_ctx
        self._n_chunk = n_chunk
        self._piece = piece
        self._is_end = is_end
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self._plan: list[Work] = []

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def submit(self, sequence: Sequence) -> None:
        """Waits for a slot behind those that came before. Its prompt must be shorter than the context."""
        self._waiting.append(sequence)

    def admit(self) -> list[Admission]:
        """Gives idle slots to waiting sequences, in order.

        The caller has the runner keep the reused tokens and tells by `reused` where that was not possible.
        """
        admissions = []
        while self._waiting:
            sequence = self._waiting[0]
            place = self.slots.try_admit(sequence.id, sequence.prompt)
            if place is None:
                break
            self._waiting.popleft()
            sequence.slot, sequence.n_evaluated = place
            self._running[sequence.id] = sequence
            admissions.append(Admission(sequence, *place))
        return admissions

    def reused(self, admission: Admission, n_kept: int) -> None:
        """The slot could keep only so many of the tokens that were to be reused."""
        self.slots.keep(admission.slot, n_kept)
        admission.sequence.n_evaluated = n_kept

    def plan(self) -> list[Work]:
        """The next step; empty when nothing runs."""
        prefilling = [sequence for sequence in self._running.values() if sequence.in_prefill]
        budget = self._n_chunk
        self._plan = []
        for n_left, sequence in zip(range(len(prefilling), 0, -1), prefilling, strict=True):
            share = max(1, budget // n_left)
            tokens = sequence.prompt[sequence.n_evaluated : sequence.n_evaluated + share]
            budget -= len(tokens)
            ends = sequence.n_evaluated + len(tokens) == len(sequence.prompt)
            self._plan.append(self._work(sequence, tokens, wanted=ends))
        for sequence in self._running.values():
            if not sequence.in_prefill:
                self._plan.append(self._work(sequence, sequence.generated[-1:], wanted=True))
        return self._plan

    def apply(self, results: Items[Sampled | SampleFailed]) -> list[Advance | Refused]:
        """Takes in what the runner made of the last plan; frees the slots of what ended by it."""
        by_sequence = {one.sequence_id: one for one in results}
        told: list[Advance | Refused] = []
        for work in self._plan:
            sequence = self._running.get(work.sequence_id)
            if sequence is None:
                continue
            self.slots.extend(work.slot, work.tokens)
            sequence.n_evaluated += len(work.tokens)
            if not work.wanted:
                told.append(_advance(sequence, "", []))
                continue
            result = by_sequence[work.sequence_id]
            if isinstance(result, SampleFailed):
                self._free(sequence)
                told.append(Refused(sequence_id=sequence.id, kind="internal", reason=result.reason))
                continue
            n_before = len(sequence.generated)
            text = self._take(sequence, result.token)
            told.append(_advance(sequence, text, sequence.generated[n_before:]))
            if sequence.finish is not None:
                self._free(sequence)
        self._plan = []
        return told

    def check_integrity(self) -> None:
        """Raises AssertionError where slots and sequences disagree."""
        self.slots.check_integrity()
        for sequence in self._running.values():
            if sequence.slot is None or self.slots.slots[sequence.slot].sequence_id != sequence.id:
                raise AssertionError(f"sequence {sequence.id} is not in slot {sequence.slot}")
            stands = [*sequence.prompt, *sequence.generated][: sequence.n_evaluated]
            if self.slots.slots[sequence.slot].tokens != stands:
                raise AssertionError(f"slot {sequence.slot} does not hold what sequence {sequence.id} evaluated")
        n_taken = sum(slot.sequence_id is not None for slot in self.slots.slots)
        if n_taken != len(self._running):
            raise AssertionError(f"{n_taken} slots are taken by {len(self._running)} sequences")

    def cancel(self, sequence_id: int) -> Advance | None:
        """Frees its slot at once. None: it had ended, or never was."""
        sequence = self._running.get(sequence_id)
        if sequence is None:
            sequence = next((one for one in self._waiting if one.id == sequence_id), None)
            if sequence is None:
                return None
            self._waiting.remove(sequence)
        sequence.finish = "cancelled"
        if sequence.slot is not None:
            self._free(sequence)
        return _advance(sequence, "", [])

    def _take(self, sequence: Sequence, token: int) -> str:
        """The text that one more token makes certain."""
        if self._is_end(token):
            sequence.finish = "stop"
            return sequence.text.end()
        sequence.generated.append(token)
        text = sequence.text.feed(self._piece(token))
        sequence.finish = self._finish(sequence)
        return text + sequence.text.end() if sequence.finish == "length" else text

    def _finish(self, sequence: Sequence) -> FinishReason | None:
        if sequence.text.stopped:
            return "stop"
        full = len(sequence.prompt) + len(sequence.generated) >= self._n_ctx
        return "length" if full or len(sequence.generated) >= sequence.max_tokens else None

    def _free(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self.slots.free(sequence.slot)
        del self._running[sequence.id]
        sequence.slot = None

    def _work(self, sequence: Sequence, tokens: Items[int], *, wanted: bool) -> Work:
        if sequence.slot is None:
            raise AssertionError(f"sequence {sequence.id} runs without a slot")
        return Work(sequence.id, sequence.slot, tokens, sequence.n_evaluated, wanted)


def _advance(sequence: Sequence, text: str, tokens: list[int]) -> Advance:
    return Advance(
        sequence_id=sequence.id,
        prompt_tokens=len(sequence.prompt),
        prompt_done=sequence.prompt_done,
        tokens=tokens,
        text=text,
        omitted_messages=sequence.omitted_messages,
        finish=sequence.finish,
    )
