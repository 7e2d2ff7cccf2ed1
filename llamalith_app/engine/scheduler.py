"""Decides what each step evaluates and what came of it: plan -> evaluate -> apply. Pure, without a clock.

A step decodes one token of every running sequence and reads as many prompt tokens as it is told, of those that are in
prefill by turns, so that a long prompt never stalls the others for longer than a chunk takes. A prefix that
another sequence is reading just now is waited for and copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from typing import NamedTuple

from llamalith_app.engine.messages import Advance, FinishReason, Refused
from llamalith_app.engine.runner_protocol import Sampled, SampleFailed, SlotModel, Work
from llamalith_app.engine.sequence import Sequence, State, Wait
from llamalith_app.engine.slots import MIN_COPIED, SlotAssignment, SlotTable, common_prefix, usable_prefix


class Admission(NamedTuple):
    """What the runner has to do for a sequence before its next step: fill its slot from the place's source, or from
    the state, and cut it to what is reused."""

    sequence: Sequence
    place: SlotAssignment
    state: State | None


class Scheduler:
    def __init__(self, model: SlotModel) -> None:
        self.slots = SlotTable(model.n_slots, model.least_cut)
        self._model = model
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self._plan: list[Work] = []

    @property
    def is_idle(self) -> bool:
        """Nothing to do until something is told: what waits, if anything, waits for its state."""
        return not self._running and all(sequence.is_reading for sequence in self._waiting)

    @property
    def n_decoding(self) -> int:
        return sum(not sequence.in_prefill for sequence in self._running.values())

    def submit(self, sequence: Sequence) -> None:
        """Waits for a slot behind those that came before. Its prompt must be shorter than the context."""
        self._waiting.append(sequence)

    def resume(self, sequence: Sequence, written: Items[int]) -> Advance | None:
        """Has it go on, once it is submitted, behind what was written of its reply before. What ends it, where that
        was the whole reply already: then it is not to be submitted."""
        text = []
        for token in written:
            text.append(self._take(sequence, token))
            if sequence.finish is not None:
                sequence.n_evaluated = sequence.n_reused = len(sequence.prompt)
                return _advance(sequence, "".join(text), sequence.generated)
        sequence.prompt, sequence.generated = [*sequence.prompt, *written], []
        sequence.written, sequence.written_text = written, "".join(text)
        return None

    def state_read(self, sequence_id: int, state: State | None) -> None:
        """What a waiting sequence was held back for has come, or could not be had."""
        for sequence in self._waiting:
            if sequence.id == sequence_id:
                sequence.state, sequence.is_reading = state, False

    def admit(self) -> list[Admission]:
        """Gives idle slots to waiting sequences, in order, and prefixes to those that waited for one.

        The caller has the runner do each, in order, and tells by `reused` where that was not possible.
        """
        admissions: list[Admission] = []
        while (sequence := next((one for one in self._waiting if not one.is_reading), None)) is not None:
            if sequence.state is not None and any(one.place.source != one.place.slot for one in admissions):
                # llama.cpp copies with the next step only, and would copy what is restored over it before.
                break
            place = self._place(sequence)
            if place is None:
                break
            self._waiting.remove(sequence)
            admissions.append(Admission(sequence, place, sequence.state))
            sequence.state = None
            sequence.slot, sequence.n_evaluated = place.slot, place.n_reused
            sequence.n_reused = place.n_reused
            sequence.wait = self._prefix_in_the_making(sequence)
            self._running[sequence.id] = sequence
        return admissions + self._shared()

    def reused(self, admission: Admission, n_kept: int) -> None:
        """The slot could keep only so many of the tokens that were to be reused."""
        sequence = admission.sequence
        self.slots.keep(admission.place.slot, n_kept)
        sequence.n_evaluated = sequence.n_reused = n_kept

    def plan(self, n_chunk: int, n_more: int = 0) -> list[Work]:
        """The next step, with at most `n_chunk` prompt tokens, or `n_more` more where they end a prompt; empty when
        nothing runs."""
        works = [
            self._work(sequence, sequence.generated[-1:], wanted=True)
            for sequence in self._running.values()
            if not sequence.in_prefill
        ]
        # One after another: a step with pieces of many prompts takes longer than as many tokens of one.
        reading = [one for one in self._running.values() if one.in_prefill and one.wait is None]
        for sequence in reading:
            if n_chunk <= 0:
                break
            n_left = len(sequence.prompt) - sequence.n_evaluated
            n_tokens = n_left if n_left <= n_chunk + n_more else n_chunk
            tokens = sequence.prompt[sequence.n_evaluated : sequence.n_evaluated + n_tokens]
            n_chunk -= n_tokens
            works.append(self._work(sequence, tokens, wanted=n_tokens == n_left))
            # Behind the others: it is their turn before it comes again.
            self._running[sequence.id] = self._running.pop(sequence.id)
        self._plan = works
        return works

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
                told.append(Refused(sequence_id=sequence.id, kind="grammar", reason=result.reason))
                continue
            n_before = len(sequence.generated)
            text = self._take(sequence, result.token)
            tokens = sequence.generated[n_before:]
            if n_before == 0:
                text, tokens = sequence.written_text + text, [*sequence.written, *tokens]
            told.append(_advance(sequence, text, tokens))
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

    def _place(self, sequence: Sequence) -> SlotAssignment | None:
        if sequence.state is not None:
            tokens, _, least_cut = sequence.state
            n_restored = usable_prefix(tokens, sequence.prompt[:-1], least_cut)
            if n_restored - self.slots.longest_prefix(sequence.prompt).n_tokens >= MIN_COPIED:
                return self.slots.try_take(sequence.id, tokens[:n_restored])
            sequence.state = None
        return self.slots.try_admit(sequence.id, sequence.prompt)

    def _prefix_in_the_making(self, sequence: Sequence) -> Wait | None:
        """(1) None where the model cannot share; (2) the sequence that is going to read the most of its prompt;
        (3) None where it stands behind what this one has already, or has not much more to give."""
        if not self._model.can_share:  # (1)
            return None
        waits = [
            Wait(other.id, other.slot, common_prefix(other.prompt, sequence.prompt[:-1]))
            for other in self._running.values()
            if other.in_prefill and other.slot is not None and other.n_evaluated >= sequence.n_evaluated
        ]
        best = max(waits, key=lambda one: one.n_tokens, default=None)  # (2)
        if best is None or best.n_tokens - sequence.n_evaluated < MIN_COPIED:  # (3)
            return None
        return best

    def _shared(self) -> list[Admission]:
        """Ends the waiting of those whose prefix stands by now, or comes no more."""
        found = []
        for sequence in self._running.values():
            wait = sequence.wait
            if wait is None or sequence.slot is None:
                continue
            other = self._running.get(wait.sequence_id)
            if other is not None and other.n_evaluated < wait.n_tokens:
                continue
            sequence.wait = None
            n_usable = self.slots.usable(wait.slot, sequence.prompt)
            if n_usable > sequence.n_evaluated:
                self.slots.copy(wait.slot, sequence.slot, n_usable)
                sequence.n_evaluated = sequence.n_reused = n_usable
                found.append(Admission(sequence, SlotAssignment(sequence.slot, wait.slot, n_usable, []), None))
        return found

    def _take(self, sequence: Sequence, token: int) -> str:
        """The text that one more token makes certain."""
        if self._model.is_end(token):
            sequence.finish = "stop"
            return sequence.text.end()
        sequence.generated.append(token)
        text = sequence.text.feed(self._model.piece(token))
        sequence.finish = self._finish(sequence)
        return text + sequence.text.end() if sequence.finish == "length" else text

    def _finish(self, sequence: Sequence) -> FinishReason | None:
        if sequence.text.stopped:
            return "stop"
        full = len(sequence.prompt) + len(sequence.generated) >= self._model.n_ctx
        n_drawn = len(sequence.written) + len(sequence.generated)
        return "length" if full or n_drawn >= sequence.max_tokens else None

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
        prompt_tokens=sequence.n_prompt,
        prompt_done=min(sequence.n_evaluated, sequence.n_prompt),
        prompt_reused=min(sequence.n_reused, sequence.n_prompt),
        tokens=tokens,
        text=text,
        omitted_messages=sequence.omitted_messages,
        opens_thinking=sequence.opens_thinking,
        finish=sequence.finish,
    )
