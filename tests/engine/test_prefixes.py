"""What is taken over from a slot gives the reply that computing would have given: on real models of each kind.

The scheduler and llama.cpp in one thread, so that the borders of the chunks are the test's own: where they differ,
llama.cpp's sums differ in their last digits, and near-ties may fall otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
import pytest

from llamalith_app.engine.loop import fill_slot
from llamalith_app.engine.runner import LlamaRunner
from llamalith_app.engine.runner_protocol import Work
from llamalith_app.engine.scheduler import Scheduler
from llamalith_app.engine.sequence import Sequence as EngineSequence
from llamalith_app.engine.sequence import SlotState
from llamalith_app.engine.text import ReplyText
from tests.engine.conftest import bundled_model, load, sampling
from tests.tiny_models import N_VOCAB, write

pytestmark = pytest.mark.slow

N_CHUNK = 24


class Reply(NamedTuple):
    tokens: list[int]
    n_reused: int
    first_logits: np.ndarray
    """After the prompt's last token."""


class Engine:
    """Driven as the child drives it, with fixed chunks."""

    def __init__(self, runner: LlamaRunner, n_chunk: int) -> None:
        self.runner = runner
        self.n_chunk = n_chunk
        self.scheduler = Scheduler(runner)
        self._ids = 0
        self.replies: dict[int, list[int]] = {}
        self.reused: dict[int, int] = {}
        self.logits: dict[int, np.ndarray] = {}

    def submit(self, prompt: Sequence[int], max_tokens: int = 12, state: SlotState | None = None) -> int:
        self._ids += 1
        self.runner.begin(self._ids, sampling(), "", None, prompt, ())
        self.replies[self._ids] = []
        self.scheduler.submit(EngineSequence(self._ids, prompt, max_tokens, ReplyText([]), state=state))
        return self._ids

    def step(self) -> None:
        for admission in self.scheduler.admit():
            fill_slot(self.scheduler, self.runner, admission)
        plan = self.scheduler.plan(self.n_chunk)
        results = self.runner.evaluate(plan)
        for work in plan:
            if work.wanted and work.sequence_id not in self.logits:
                self.logits[work.sequence_id] = _logits(self.runner, work)
        for result in self.scheduler.apply(results):
            self.replies[result.sequence_id] += result.tokens  # type: ignore[union-attr]
            self.reused[result.sequence_id] = result.prompt_reused  # type: ignore[union-attr]
        self.scheduler.check_integrity()

    def run(self, prompt: Sequence[int], max_tokens: int = 12, state: SlotState | None = None) -> Reply:
        sequence_id = self.submit(prompt, max_tokens, state)
        self.finish()
        return self.reply(sequence_id)

    def finish(self) -> None:
        while not self.scheduler.is_idle:
            self.step()

    def reply(self, sequence_id: int) -> Reply:
        return Reply(self.replies[sequence_id], self.reused[sequence_id], self.logits[sequence_id])


def _logits(runner: LlamaRunner, work: Work) -> Any:
    batch = runner._batch
    (row,) = [row for row in range(batch.n_tokens) if batch.logits[row] and batch.seq_id[row][0] == work.slot]
    logits = llama_cpp.llama_get_logits_ith(runner._context, row)
    return np.ctypeslib.as_array(logits, shape=(runner._n_vocab,)).copy()


Open = Callable[..., Any]


@pytest.fixture(scope="module", params=["smollm2", "llama", "sliding", "recurrent", "hybrid"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def path(kind: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundled_model() if kind == "smollm2" else write(tmp_path_factory.mktemp("models") / f"{kind}.gguf", kind)


@pytest.fixture
def open_engine(path: Path) -> Iterator[Open]:
    """`open_engine(n_slots)`: an engine with empty slots."""
    opened: list[LlamaRunner] = []

    def open_engine(n_slots: int = 1, n_chunk: int = N_CHUNK) -> Engine:
        changed = {"path": str(path), "n_slots": n_slots, "n_chunk": 128, "n_ctx": 1024, "n_threads": 1}
        opened.append(LlamaRunner(load(**changed), lambda _: None))
        return Engine(opened[-1], n_chunk)

    yield open_engine
    for runner in opened:
        runner.close()


def tokens(seed: object, n_tokens: int) -> list[int]:
    """No control tokens, none of the first ones, which are bytes."""
    return random.Random(str(seed)).choices(range(300, N_VOCAB), k=n_tokens)


def prompts(kind: str, n_prompts: int) -> list[tuple[list[int], list[int]]]:
    """A head of whole chunks and what follows it. Fewer and shorter ones for a model that takes long to compute."""
    n_chunks, n_prompts = (2, max(3, n_prompts // 8)) if kind == "smollm2" else (10, n_prompts)
    return [(tokens(("head", n), n_chunks * N_CHUNK), tokens(("tail", n), 10 + n % 30)) for n in range(n_prompts)]


def test_a_head_in_its_own_slot_gives_the_same_reply(kind: str, open_engine: Open) -> None:
    cold, warm = open_engine(), open_engine()
    for head, tail in prompts(kind, 50):
        warm.run(head, max_tokens=1)
        expected, reply = cold.run([*head, *tail]), warm.run([*head, *tail])
        assert (expected.n_reused, reply.n_reused) == (0, len(head))
        assert reply.tokens == expected.tokens


def test_a_head_that_was_copied_gives_the_same_reply(kind: str, open_engine: Open) -> None:
    cold, warm = open_engine(2), open_engine(2)
    for head, tail in prompts(kind, 10):
        expected = cold.run([*head, *tail])
        # Still at work, the other one's slot is no place to go on in.
        other = warm.submit(head, max_tokens=40)
        for _ in range(len(head) // N_CHUNK):
            warm.step()
        reply = warm.run([*head, *tail])
        assert (expected.n_reused, reply.n_reused) == (0, len(head))
        assert len(warm.reply(other).tokens) == 40
        # Beside another sequence the batches have other shapes.
        np.testing.assert_allclose(reply.first_logits, expected.first_logits, atol=tolerance(kind))


def tolerance(kind: str) -> float:
    """Of logits, between batches of other shapes or cells in another order; one other token makes it 10 to 70."""
    return {"smollm2": 0.6, "sliding": 3.0}.get(kind, 0.01)


def test_a_head_that_was_restored_gives_the_same_reply(kind: str, open_engine: Open) -> None:
    cold, source, warm = open_engine(), open_engine(), open_engine()
    for head, tail in prompts(kind, 10):
        expected = cold.run([*head, *tail])
        source.run(head, max_tokens=1)
        data = source.runner.save(0, 1 << 30)
        assert data is not None
        reply = warm.run([*head, *tail], state=SlotState(list(head), data))
        assert (expected.n_reused, reply.n_reused) == (0, len(head))
        np.testing.assert_allclose(reply.first_logits, expected.first_logits, atol=tolerance(kind))
        # A window's cells come back in another order, in which llama.cpp then adds.
        assert kind == "sliding" or reply.tokens == expected.tokens


@pytest.mark.parametrize("n_tokens", [50, 100, 500])
def test_how_far_a_restored_state_can_be_cut_is_known_when_it_is_saved(
    kind: str, open_engine: Open, n_tokens: int
) -> None:
    source, other = open_engine(), open_engine()
    source.run(tokens(("head", 0), n_tokens), max_tokens=1)
    data = source.runner.save(0, 1 << 30)
    assert data is not None
    assert other.runner.restore(0, data)
    least = other.runner.least_cut_restored(n_tokens)
    assert least == other.runner.least_cut(0)
    if least < n_tokens:
        assert other.runner.keep(0, least) == least


@pytest.mark.parametrize("n_beyond", [1, 20, 300])
def test_a_slot_that_is_cut_back_gives_the_same_reply(kind: str, open_engine: Open, n_beyond: int) -> None:
    cold, warm = open_engine(), open_engine()
    for number, (head, tail) in enumerate(prompts(kind, 5)):
        expected = cold.run([*head, *tail])
        warm.run([*head, *tokens(("beyond", number), n_beyond)], max_tokens=1)
        reply = warm.run([*head, *tail])
        # What a window or a recurrent state has forgotten is computed again.
        can_cut = kind in ("smollm2", "llama") or (kind == "sliding" and n_beyond == 1)
        assert reply.n_reused == len(head) if can_cut else reply.n_reused in (0, len(head))
        if kind in ("recurrent", "hybrid"):
            assert reply.n_reused == 0
        assert reply.tokens == expected.tokens


def test_a_head_that_is_read_just_now_is_waited_for(kind: str, open_engine: Open) -> None:
    cold, warm = open_engine(4), open_engine(4)
    head = tokens("shared", 4 * N_CHUNK)
    tails = [tokens(("own", number), 8 + number) for number in range(4)]
    expected = [cold.run([*head, *tail]) for tail in tails]
    ids = [warm.submit([*head, *tail]) for tail in tails]
    warm.finish()
    replies = [warm.reply(one) for one in ids]
    n_shared = len(head) if kind not in ("recurrent", "hybrid") else 0
    assert [reply.n_reused for reply in replies] == [0, n_shared, n_shared, n_shared]
    for reply, one in zip(replies, expected, strict=True):
        np.testing.assert_allclose(reply.first_logits, one.first_logits, atol=tolerance(kind))
