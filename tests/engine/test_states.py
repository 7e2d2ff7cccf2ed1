"""States on disk: what comes back is what was written, or nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamalith_app.engine.sequence import SlotState
from llamalith_app.engine.states import SUFFIX, SavedState, StateStore

TOKENS = list(range(1000, 1100))
DATA = bytes(range(256)) * 40
ENOUGH = 1 << 20


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


def found(states: StateStore, prompt: list[int]) -> SavedState:
    saved = states.best(prompt)
    assert saved is not None
    return saved


def test_a_state_comes_back_for_a_prompt_that_goes_on_from_it(tmp_path: Path) -> None:
    StateStore(tmp_path, "model", ENOUGH).write(SlotState(TOKENS, DATA))
    states = StateStore(tmp_path, "model", ENOUGH)
    saved = found(states, [*TOKENS, 1, 2])
    assert saved.n_usable == len(TOKENS)
    assert states.read(saved) == (TOKENS, DATA, 0)


def test_the_state_that_holds_most_of_the_prompt_is_the_best(tmp_path: Path) -> None:
    states = StateStore(tmp_path, "model", ENOUGH)
    states.write(SlotState([*TOKENS[:50], 1], b"short"))
    states.write(SlotState([*TOKENS, 2], b"long"))
    assert found(states, [*TOKENS, 9]).tokens.tolist() == [*TOKENS, 2]
    assert found(states, [*TOKENS[:60], 9]).n_usable == 60
    assert states.best([7, 8]) is None
    assert states.n_restorable([*TOKENS[:50], 1, 5]) == 51


def test_a_continuation_replaces_what_it_goes_on_from(tmp_path: Path) -> None:
    states = StateStore(tmp_path, "model", ENOUGH)
    states.write(SlotState(TOKENS, b"turn 1"))
    states.write(SlotState([5, 6], b"other"))
    assert states.best([*TOKENS, 0]) is not None
    states.write(SlotState([*TOKENS, 1, 2], b"turn 2"))
    assert len(files(tmp_path)) == 2
    assert found(states, [*TOKENS, 1, 2, 3]).n_usable == len(TOKENS) + 2


def test_a_state_that_cannot_be_cut_is_for_prompts_that_go_on_from_all_of_it(tmp_path: Path) -> None:
    states = StateStore(tmp_path, "model", ENOUGH)
    states.write(SlotState(TOKENS, b"turn 1", least_cut=1000))
    assert states.best([*TOKENS[:50], 0]) is None
    assert found(states, [*TOKENS, 0]).n_usable == len(TOKENS)
    # What cannot be had from the longer one is kept beside it.
    states.write(SlotState([*TOKENS, 1, 2], b"turn 2", least_cut=1000))
    assert found(states, [*TOKENS, 1, 9]).n_usable == len(TOKENS)
    assert states.n_restorable([*TOKENS, 1, 9]) == len(TOKENS)
    state = states.read(found(states, [*TOKENS, 1, 2, 9]))
    assert state is not None
    assert (state.data, state.least_cut) == (b"turn 2", 1000)


def test_what_was_forgotten_is_not_found(tmp_path: Path) -> None:
    states = StateStore(tmp_path, "model", ENOUGH)
    states.write(SlotState(TOKENS, DATA))
    states.forget(TOKENS)
    assert states.best([*TOKENS, 1]) is None
    assert files(tmp_path) == []


def test_what_stood_unused_when_it_was_written_goes_before_what_was_used(tmp_path: Path) -> None:
    states = StateStore(tmp_path, "model", 2 * (len(DATA) + 1000))
    now = time.time()
    states.write(SlotState([1, *TOKENS], DATA))
    states.write(SlotState([2, *TOKENS], DATA), used_at=now - 60)
    states.write(SlotState([3, *TOKENS], DATA), used_at=now - 30)
    assert [number for number in (1, 2, 3) if states.best([number, *TOKENS, 0]) is not None] == [1, 3]


def test_another_model_s_state_is_never_taken(tmp_path: Path) -> None:
    StateStore(tmp_path, "model a", ENOUGH).write(SlotState(TOKENS, DATA))
    other = StateStore(tmp_path, "model b", ENOUGH)
    assert other.best([*TOKENS, 1]) is None
    (path,) = files(tmp_path)
    path.rename(path.with_name(f"{other._model[:16]}-renamed{SUFFIX}"))
    assert other.best([*TOKENS, 1]) is None


def test_states_of_all_models_together_stay_below_the_limit_and_the_least_used_goes_first(tmp_path: Path) -> None:
    limit = 4 * (len(DATA) + 1000)
    for age, model in enumerate(("a", "b", "a", "b")):
        StateStore(tmp_path, model, limit).write(SlotState([age, *TOKENS], DATA))
        newest = max(files(tmp_path), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (age, age))
    states = StateStore(tmp_path, "a", limit)
    states.read(found(states, [0, *TOKENS, 1]))
    states.write(SlotState([9, *TOKENS], DATA))
    assert sum(path.stat().st_size for path in files(tmp_path)) <= limit
    assert states.best([0, *TOKENS, 1]) is not None
    assert StateStore(tmp_path, "b", limit).best([1, *TOKENS, 1]) is None


def test_a_state_above_the_limit_is_not_written(tmp_path: Path) -> None:
    StateStore(tmp_path, "model", 10).write(SlotState(TOKENS, DATA))
    assert files(tmp_path) == []


def test_only_the_owner_can_read_a_state(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    StateStore(folder, "model", ENOUGH).write(SlotState(TOKENS, DATA))
    assert folder.stat().st_mode & 0o077 == 0
    assert files(folder)[0].stat().st_mode & 0o077 == 0


def test_a_full_disk_loses_a_state_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = StateStore(tmp_path, "model", ENOUGH)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    states.write(SlotState(TOKENS, DATA))
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_writer_left_is_removed(tmp_path: Path) -> None:
    old, new = tmp_path / "a.1.tmp", tmp_path / "b.2.tmp"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    StateStore(tmp_path, "model", ENOUGH)
    assert list(tmp_path.iterdir()) == [new]


@settings(max_examples=3 * settings().max_examples)
@given(st.data())
def test_a_damaged_file_is_never_taken_for_a_state(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("states")
    states = StateStore(folder, "model", ENOUGH)
    states.write(SlotState(TOKENS, DATA))
    (path,) = files(folder)
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = data.draw(
        st.one_of(
            st.just(whole[:at]),
            st.integers(1, 255).map(lambda flip: whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :]),
            st.binary(min_size=1, max_size=50).map(lambda more: whole + more),
        )
    )
    before = data.draw(st.booleans())
    saved = found(states, [*TOKENS, 1]) if before else None
    path.write_bytes(damaged)
    saved = saved or StateStore(folder, "model", ENOUGH).best([*TOKENS, 1])
    assert saved is None or states.read(saved) is None
    assert files(folder) == []
