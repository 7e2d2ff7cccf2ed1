"""Who gets which slot, and what of it is used again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamalith_app.engine.slots import MIN_COPIED, SlotAssignment, SlotTable, common_prefix

LONG = list(range(100, 100 + MIN_COPIED))


def slot_table(n_slots: int, *, can_cut: bool = True) -> SlotTable:
    return SlotTable(n_slots, lambda _: 0 if can_cut else 1000)


def admitted(table: SlotTable, sequence_id: int, tokens: list[int]) -> int:
    """The slot in which all of the tokens were evaluated."""
    assignment = table.try_admit(sequence_id, tokens)
    assert assignment is not None
    table.extend(assignment.slot, tokens[assignment.n_reused :])
    return assignment.slot


def idle(table: SlotTable, *contents: list[int]) -> list[int]:
    """Idle slots that hold these, the first one unused for longest."""
    slots = [admitted(table, 1000 + at, tokens) for at, tokens in enumerate(contents)]
    for slot in slots:
        table.free(slot)
    return slots


def test_a_prompt_goes_where_the_longest_part_of_it_stands() -> None:
    table = slot_table(3)
    short, long, _ = idle(table, [1, 2], [1, 2, 3], [9])
    assert table.try_admit(10, [1, 2, 3, 4]) == SlotAssignment(long, long, 3, [])
    assert table.try_admit(11, [1, 2, 3, 4]) == SlotAssignment(short, short, 2, [])


def test_among_equals_the_slot_unused_for_longest_is_taken() -> None:
    table = slot_table(2)
    first, second = admitted(table, 1, [1]), admitted(table, 2, [2])
    table.free(second)
    table.free(first)
    assert table.try_admit(3, [7, 8]) == SlotAssignment(second, second, 0, [2])


def test_the_last_prompt_token_is_never_reused() -> None:
    table = slot_table(1)
    table.free(admitted(table, 1, [1, 2, 3]))
    assert table.try_admit(2, [1, 2, 3]) == SlotAssignment(0, 0, 2, [1, 2, 3])
    assert table.slots[0].tokens == [1, 2]


def test_nobody_is_admitted_while_all_slots_are_taken() -> None:
    table = slot_table(1)
    admitted(table, 1, [1])
    assert table.try_admit(2, [1]) is None


def test_a_prefix_is_copied_into_an_empty_slot_rather_than_cut_out_of_its_own() -> None:
    table = slot_table(2)
    (held,) = idle(table, [*LONG, 1, 2, 3])
    assignment = table.try_admit(1, [*LONG, 7, 8])
    assert assignment == SlotAssignment(1 - held, held, len(LONG), [])
    assert table.slots[held].tokens == [*LONG, 1, 2, 3]
    assert table.slots[1 - held].tokens == LONG


def test_a_prefix_is_copied_from_a_slot_that_is_at_work() -> None:
    table = slot_table(2)
    working = admitted(table, 1, [*LONG, 1, 2, 3])
    assert table.try_admit(2, [*LONG, 7, 8]) == SlotAssignment(1 - working, working, len(LONG), [])


def test_a_prefix_that_is_too_short_is_not_copied() -> None:
    table = slot_table(2)
    working = admitted(table, 1, [*LONG[1:], 1, 2, 3])
    assert table.try_admit(2, [*LONG[1:], 7]) == SlotAssignment(1 - working, 1 - working, 0, [])


def test_an_eviction_reports_all_tokens_that_the_slot_held() -> None:
    table = slot_table(1)
    idle(table, [*LONG, 1, 2])
    assert table.try_admit(1, [*LONG, 7]) == SlotAssignment(0, 0, len(LONG), [*LONG, 1, 2])


def test_a_slot_that_cannot_be_cut_is_reused_whole_or_not_at_all() -> None:
    table = slot_table(2, can_cut=False)
    (held,) = idle(table, LONG)
    assert table.try_admit(1, [*LONG[:-1], 7, 8]) == SlotAssignment(1 - held, 1 - held, 0, [])
    assert table.try_admit(2, [*LONG, 7]) == SlotAssignment(held, held, len(LONG), [])


def test_one_sequence_in_two_slots_is_noticed() -> None:
    table = slot_table(2)
    admitted(table, 1, [1])
    admitted(table, 1, [2])
    with pytest.raises(AssertionError, match="two slots"):
        table.check_integrity()


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_a_common_prefix_is_as_long_as_it_can_be(head: list[int], one: list[int], other: list[int]) -> None:
    left, right = head + one, head + other
    n_common = common_prefix(left, right)
    assert left[:n_common] == right[:n_common]
    assert n_common == min(len(left), len(right)) or left[n_common] != right[n_common]
