"""Who gets which slot, and what of it is used again."""

from __future__ import annotations

import pytest

from llamalith_app.engine.slots import SlotTable


def admitted(table: SlotTable, sequence_id: int, tokens: list[int]) -> int:
    """The slot in which all of the tokens were evaluated."""
    place = table.try_admit(sequence_id, tokens)
    assert place is not None
    slot, n_reused = place
    table.extend(slot, tokens[n_reused:])
    return slot


def test_a_prompt_goes_where_the_longest_part_of_it_stands() -> None:
    table = SlotTable(3)
    short, long, other = (admitted(table, at, tokens) for at, tokens in enumerate([[1, 2], [1, 2, 3], [9]]))
    for slot in (short, long, other):
        table.free(slot)
    assert table.try_admit(10, [1, 2, 3, 4]) == (long, 3)
    assert table.try_admit(11, [1, 2, 3, 4]) == (short, 2)


def test_among_equals_the_slot_unused_for_longest_is_taken() -> None:
    table = SlotTable(2)
    first, second = admitted(table, 1, [1]), admitted(table, 2, [2])
    table.free(second)
    table.free(first)
    assert table.try_admit(3, [7, 8]) == (second, 0)


def test_the_last_prompt_token_is_never_reused() -> None:
    table = SlotTable(1)
    table.free(admitted(table, 1, [1, 2, 3]))
    assert table.try_admit(2, [1, 2, 3]) == (0, 2)
    assert table.slots[0].tokens == [1, 2]


def test_nobody_is_admitted_while_all_slots_are_taken() -> None:
    table = SlotTable(1)
    admitted(table, 1, [1])
    assert table.try_admit(2, [1]) is None


def test_one_sequence_in_two_slots_is_noticed() -> None:
    table = SlotTable(2)
    admitted(table, 1, [1])
    admitted(table, 1, [2])
    with pytest.raises(AssertionError, match="two slots"):
        table.check_integrity()
