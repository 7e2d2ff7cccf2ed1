"""Decides what each step of the engine computes, and applies the results. The loop calls `admit`, `plan`, evaluates the
plan, and calls `apply`.

A sequence is one prompt on its way to a reply (`sequence.py`). It waits until a slot is idle, is admitted to the slot,
reads its prompt (prefill), and writes its reply (decode). Owns all sequences, waiting or running, and the slot table.
Pure: it has no clock and knows neither llama.cpp nor the disk.

A step has one token for each sequence in decode, and at most `n_chunk` prompt tokens. These go to one prompt as far as
possible, and the next step begins with another prompt: so a long prompt delays the others by one chunk at most.

If another sequence is just reading the same beginning of a prompt, a sequence waits until that part is ready and copies
it. It has its slot already while it waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from typing import NamedTuple

from llamalith_app.engine.messages import Advance, FinishReason, Refused
from llamalith_app.engine.runner_protocol import Sampled, SampleFailed, SlotModel, Work
from llamalith_app.engine.sequence import PrefixWait, Sequence, SlotState
from llamalith_app.engine.slots import MIN_COPIED, SlotAssignment, SlotTable, common_prefix, usable_prefix


class Admission(NamedTuple):
    """Work for the caller before the next step. The runner must fill the sequence's slot from the assignment's source
    slot, or from `state` if there is one, and then cut it to the reused tokens."""

    sequence: Sequence
    assignment: SlotAssignment
    state: SlotState | None


class Scheduler:
    """`model` says how many slots there are, what can be shared, and which text each token has."""

    def __init__(self, model: SlotModel) -> None:
        self.slots = SlotTable(model.n_slots, model.least_cut)
        self._model = model
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self._plan: list[Work] = []

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute: nothing runs, and every waiting sequence still waits for its state from
        disk."""
        return not self._running and all(sequence.awaits_state for sequence in self._waiting)

    @property
    def n_decoding(self) -> int:
        """Running sequences that are past prefill."""
        return sum(not sequence.in_prefill for sequence in self._running.values())

    def submit(self, sequence: Sequence) -> None:
        """Puts the sequence at the end of the queue for a slot. Its prompt must be shorter than the context."""
        self._waiting.append(sequence)

    def resume(self, sequence: Sequence, written: Items[int]) -> Advance | None:
        """Makes the sequence go on after the tokens `written` by an earlier attempt. Call it before `submit`.
        If these tokens are a whole reply already, it returns the final Advance; do not submit the sequence then."""
        text = []
        for token in written:
            text.append(self._append_token(sequence, token))
            if sequence.finish is not None:
                sequence.n_evaluated = sequence.n_reused = len(sequence.prompt)
                return _advance(sequence, "".join(text), sequence.generated)
        sequence.prompt, sequence.generated = [*sequence.prompt, *written], []
        sequence.written, sequence.written_text = written, "".join(text)
        return None

    def deliver_state(self, sequence_id: int, state: SlotState | None) -> None:
        """Lets a sequence be admitted that had to wait for its state from disk. None: there is no state, so the prompt
        is computed."""
        for sequence in self._waiting:
            if sequence.id == sequence_id:
                sequence.state, sequence.awaits_state = state, False

    def admit(self) -> list[Admission]:
        """Gives idle slots to waiting sequences, in the order of their submission. Those that wait for a state from
        disk are passed over. Also ends the waits for prefixes that are ready.

        The caller must carry out the admissions in this order. If the runner could keep fewer tokens than an admission
        reuses, the caller calls `correct_reuse`.
        """
        admissions: list[Admission] = []
        while (sequence := next((waiting for waiting in self._waiting if not waiting.awaits_state), None)) is not None:
            if sequence.state is not None and any(
                earlier.assignment.source != earlier.assignment.slot for earlier in admissions
            ):
                # llama.cpp copies during the next step. It would copy after this restore and overwrite it.
                break
            assignment = self._assign_slot(sequence)
            if assignment is None:
                break
            self._waiting.remove(sequence)
            admissions.append(Admission(sequence, assignment, sequence.state))
            sequence.state = None
            sequence.slot, sequence.n_evaluated = assignment.slot, assignment.n_reused
            sequence.n_reused = assignment.n_reused
            sequence.wait = self._prefix_to_wait_for(sequence)
            self._running[sequence.id] = sequence
        return admissions + self._copy_ready_prefixes()

    def correct_reuse(self, admission: Admission, n_kept: int) -> None:
        """Notes that the slot kept only `n_kept` of the tokens that the admission reuses."""
        sequence = admission.sequence
        self.slots.keep(admission.assignment.slot, n_kept)
        sequence.n_evaluated = sequence.n_reused = n_kept

    def plan(self, n_chunk: int, n_more: int = 0) -> list[Work]:
        """The work of the next step, with at most `n_chunk` prompt tokens. A prompt may get up to `n_more` more if
        that completes it. Empty if nothing runs."""
        works = [
            self._work_for(sequence, sequence.generated[-1:], wanted=True)
            for sequence in self._running.values()
            if not sequence.in_prefill
        ]
        # One prompt after another: tokens of several prompts take longer than as many tokens of one.
        in_prefill = [running for running in self._running.values() if running.in_prefill and running.wait is None]
        for sequence in in_prefill:
            if n_chunk <= 0:
                break
            n_left = len(sequence.prompt) - sequence.n_evaluated
            n_tokens = n_left if n_left <= n_chunk + n_more else n_chunk
            tokens = sequence.prompt[sequence.n_evaluated : sequence.n_evaluated + n_tokens]
            n_chunk -= n_tokens
            works.append(self._work_for(sequence, tokens, wanted=n_tokens == n_left))
            # Behind the others, so that the sequences in prefill take turns.
            self._running[sequence.id] = self._running.pop(sequence.id)
        self._plan = works
        return works

    def apply(self, results: Items[Sampled | SampleFailed]) -> list[Advance | Refused]:
        """Applies the results of the last plan: notes what was evaluated, adds the sampled tokens to the replies, and
        frees the slots of sequences that ended. Returns the messages for the worker, in the order of the plan. A
        sequence that was cancelled meanwhile is passed over."""
        sampled = {result.sequence_id: result for result in results}
        outcomes: list[Advance | Refused] = []
        for work in self._plan:
            sequence = self._running.get(work.sequence_id)
            if sequence is None:
                continue
            self.slots.extend(work.slot, work.tokens)
            sequence.n_evaluated += len(work.tokens)
            if not work.wanted:
                outcomes.append(_advance(sequence, "", []))
                continue
            result = sampled[work.sequence_id]
            if isinstance(result, SampleFailed):
                self._free(sequence)
                outcomes.append(Refused(sequence_id=sequence.id, kind="grammar", reason=result.reason))
                continue
            n_before = len(sequence.generated)
            text = self._append_token(sequence, result.token)
            tokens = sequence.generated[n_before:]
            if n_before == 0:
                text, tokens = sequence.written_text + text, [*sequence.written, *tokens]
            outcomes.append(_advance(sequence, text, tokens))
            if sequence.finish is not None:
                self._free(sequence)
        self._plan = []
        return outcomes

    def check_integrity(self) -> None:
        """Raises AssertionError if slots and sequences disagree. Only tests call it."""
        self.slots.check_integrity()
        for sequence in self._running.values():
            if sequence.slot is None or self.slots.slots[sequence.slot].sequence_id != sequence.id:
                raise AssertionError(f"sequence {sequence.id} is not in slot {sequence.slot}")
            evaluated = [*sequence.prompt, *sequence.generated][: sequence.n_evaluated]
            if self.slots.slots[sequence.slot].tokens != evaluated:
                raise AssertionError(f"slot {sequence.slot} does not hold what sequence {sequence.id} evaluated")
        n_taken = sum(slot.sequence_id is not None for slot in self.slots.slots)
        if n_taken != len(self._running):
            raise AssertionError(f"{n_taken} slots are taken by {len(self._running)} sequences")

    def written(self, sequence_id: int) -> list[int] | None:
        """The tokens of its reply so far. None: there is no such sequence, or it has ended."""
        waiting = (sequence for sequence in self._waiting if sequence.id == sequence_id)
        sequence = self._running.get(sequence_id) or next(waiting, None)
        return None if sequence is None else [*sequence.written, *sequence.generated]

    def cancel(self, sequence_id: int) -> Advance | None:
        """Ends the sequence, waiting or running, frees its slot, and returns the final Advance. None: there is no such
        sequence, or it had ended before."""
        sequence = self._running.get(sequence_id)
        if sequence is None:
            sequence = next((waiting for waiting in self._waiting if waiting.id == sequence_id), None)
            if sequence is None:
                return None
            self._waiting.remove(sequence)
        sequence.finish = "cancelled"
        if sequence.slot is not None:
            self._free(sequence)
        return _advance(sequence, "", [])

    def _assign_slot(self, sequence: Sequence) -> SlotAssignment | None:
        if sequence.state is not None:
            tokens, _, least_cut = sequence.state
            n_restored = usable_prefix(tokens, sequence.prompt[:-1], least_cut)
            if n_restored - self.slots.longest_prefix(sequence.prompt).n_tokens >= MIN_COPIED:
                return self.slots.try_take(sequence.id, tokens[:n_restored])
            sequence.state = None
        return self.slots.try_admit(sequence.id, sequence.prompt)

    def _prefix_to_wait_for(self, sequence: Sequence) -> PrefixWait | None:
        """Which prefix this new sequence waits for, if waiting beats computing.

        (1) None if the model cannot share. (2) Otherwise the sequence in prefill with the longest common prefix, (3)
        unless that prefix is hardly longer than what this sequence has already."""
        if not self._model.can_share:  # (1)
            return None
        waits = [
            PrefixWait(other.id, other.slot, common_prefix(other.prompt, sequence.prompt[:-1]))
            for other in self._running.values()
            if other.in_prefill and other.slot is not None and other.n_evaluated >= sequence.n_evaluated
        ]
        best = max(waits, key=lambda wait: wait.n_tokens, default=None)  # (2)
        if best is None or best.n_tokens - sequence.n_evaluated < MIN_COPIED:  # (3)
            return None
        return best

    def _copy_ready_prefixes(self) -> list[Admission]:
        """Ends the wait of each sequence whose prefix is ready, or whose other sequence has ended. Returns the copies
        that the caller must carry out."""
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

    def _append_token(self, sequence: Sequence, token: int) -> str:
        """Adds one token to the reply, and sets `finish` if the reply ends with it. Returns the text that can be shown
        now."""
        if self._model.is_end(token):
            sequence.finish = "stop"
            return sequence.text.end()
        sequence.generated.append(token)
        text = sequence.text.feed(self._model.piece(token), is_marker=self._model.is_marker(token))
        sequence.finish = self._finish_reason(sequence)
        return text + sequence.text.end() if sequence.finish == "length" else text

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
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

    def _work_for(self, sequence: Sequence, tokens: Items[int], *, wanted: bool) -> Work:
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
        markers=sequence.text.take_markers(),
        omitted_messages=sequence.omitted_messages,
        opens_thinking=sequence.opens_thinking,
        finish=sequence.finish,
    )
