"""Decides what each step evaluates, and what its result means: `admit -> plan -> (evaluate) -> apply`.

Each step decodes one token for every running sequence and adds prefill up to `n_chunk` prompt tokens, so a long prompt
never stalls the others. Pure: never touches llama.cpp, frames or a clock. Nothing may come between `plan` and its `apply`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from llamalith_app.engine.messages import Advance, Refused
from llamalith_app.engine.sequence import Sequence
from llamalith_app.engine.slots import SlotTable
from llamalith_app.engine.steps import Sampled, SampleFailed, StepPlan, Vocabulary, Work


class Scheduler:
    def __init__(self, slots: SlotTable, vocabulary: Vocabulary, *, n_ctx: int, n_chunk: int) -> None:
        self._slots = slots
        self._vocabulary = vocabulary
        self._n_ctx = n_ctx
        self._n_chunk = n_chunk
        self._waiting: deque[Sequence] = deque()
        """In order of arrival; none has a slot."""
        self._prefilling: deque[Sequence] = deque()
        """The one whose last chunk is longest ago comes first."""
        self._decoding: dict[int, Sequence] = {}
        """By slot."""

    @property
    def is_idle(self) -> bool:
        return not (self._waiting or self._prefilling or self._decoding)

    def submit(self, sequence: Sequence) -> None:
        """Raises ValueError for a prompt that is empty or does not leave room for one token."""
        if not 0 < len(sequence.prompt) < self._n_ctx:
            raise ValueError(f"a prompt of {len(sequence.prompt)} tokens in a context of {self._n_ctx}")
        self._waiting.append(sequence)

    def cancel(self, sequence_id: int) -> Advance | None:
        """Its last advance; its slot is free at once. None: it had ended."""
        sequence = next((one for one in self._all() if one.id == sequence_id), None)
        if sequence is None:
            return None
        self.drop(sequence)
        return sequence.advance("cancelled")

    def drop(self, sequence: Sequence) -> None:
        """Ends it without a word."""
        if sequence.slot is None:
            self._waiting.remove(sequence)
            return
        if self._decoding.pop(sequence.slot, None) is None:
            self._prefilling.remove(sequence)
        self._slots.free(sequence.slot)

    def admit(self) -> list[Sequence]:
        """Gives idle slots to those that wait; `n_done` of each says how much of the slot is kept."""
        admitted = []
        while self._waiting:
            sequence = self._waiting[0]
            admission = self._slots.try_admit(sequence.id, sequence.prompt)
            if admission is None:
                break
            sequence.slot, sequence.n_done = admission.slot, admission.n_kept
            self._prefilling.append(self._waiting.popleft())
            admitted.append(sequence)
        return admitted

    def plan(self) -> StepPlan:
        """Empty when nothing runs."""
        work = [self._work(slot, sequence) for slot, sequence in self._decoding.items()]
        n_left = self._n_chunk
        for sequence in list(self._prefilling):
            one = self._work(sequence.slot, sequence)
            # Only whole chunks, so that a prompt is cut at the same places whoever runs beside it: other borders
            # round differently, and the same prompt would not get the same reply.
            if len(one.tokens) <= n_left:
                work.append(one)
                n_left -= len(one.tokens)
                self._prefilling.remove(sequence)
                self._prefilling.append(sequence)
        return StepPlan(work)

    def apply(self, plan: StepPlan, results: Iterable[Sampled | SampleFailed]) -> list[Advance | Refused]:
        """What the step did for each sequence in it. Who ended has left its slot."""
        by_slot = {result.slot: result for result in results}
        prefilled = {sequence.slot: sequence for sequence in self._prefilling}
        return [
            self._apply(work, self._decoding.get(work.slot) or prefilled[work.slot], by_slot.get(work.slot))
            for work in plan.work
        ]

    def check_integrity(self) -> None:
        """Raises AssertionError when slots and sequences disagree."""
        self._slots.check_integrity()
        in_slots = [*self._prefilling, *self._decoding.values()]
        if len({sequence.slot for sequence in in_slots}) != len(in_slots):
            raise AssertionError("two sequences in one slot")
        for sequence in in_slots:
            held = [*sequence.prompt, *sequence.reply][: sequence.n_done]
            if sequence.slot is None or list(self._slots.holds(sequence.slot)) != held:
                raise AssertionError(f"slot {sequence.slot} does not hold what sequence {sequence.id} evaluated")
        if any(sequence.slot is not None for sequence in self._waiting):
            raise AssertionError("a waiting sequence has a slot")

    def _all(self) -> list[Sequence]:
        return [*self._waiting, *self._prefilling, *self._decoding.values()]

    def _work(self, slot: int | None, sequence: Sequence) -> Work:
        assert slot is not None
        tokens = list(sequence.next_tokens(self._n_chunk))
        return Work(slot, tokens, sequence.n_done, wanted=sequence.n_done + len(tokens) >= len(sequence.prompt))

    def _apply(
        self, work: Work, sequence: Sequence, result: Sampled | SampleFailed | None
    ) -> Advance | Refused:
        self._slots.extend(work.slot, work.tokens)
        sequence.n_done += len(work.tokens)
        if not work.wanted:
            return sequence.advance()
        if result is None:
            raise ValueError(f"nothing was sampled for slot {work.slot}")
        if isinstance(result, SampleFailed):
            self.drop(sequence)
            return Refused(sequence_id=sequence.id, kind="internal", reason=result.reason)
        if work.slot not in self._decoding:
            self._prefilling.remove(sequence)
            self._decoding[work.slot] = sequence
        advance = sequence.write(result.token, self._vocabulary, self._n_ctx)
        if advance.finish is not None:
            self.drop(sequence)
        return advance
