"""The prompts: the same for every server, and each used once, so that no server has a prefix in its cache."""

from __future__ import annotations

import random
from collections.abc import Sequence

from bench.client import Message

ANIMALS = ("dragon", "fox", "whale", "owl", "bear", "mouse", "horse", "crow", "otter", "tiger", "frog", "wolf")
PLACES = ("a village", "the old harbour", "a library", "the desert", "a tower", "the forest", "an island", "a mine")
TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend father power hour game line end member law car city community name president team minute idea "
    "body information back parent face others level office door health person art war history party result change "
    "morning reason research girl guy moment air teacher force education"
)
WORDS = TEXT.split()
SYSTEM_WORDS = 385
"""About 400 tokens with the template's own."""
HISTORY_WORDS = 1960
"""About 2,000 tokens with the template's own and a short reply."""


def short(series: str, n: int) -> list[list[Message]]:
    """So many prompts of some 30 tokens with long answers."""
    draw = random.Random(series)  # noqa: S311 - the same in each run
    return [
        [
            Message(
                "user",
                f"Write a very long story about {draw.choice(ANIMALS)} number {draw.randrange(10_000)} in "
                f"{draw.choice(PLACES)}, with every detail of its life.",
            )
        ]
        for _ in range(n)
    ]


def with_system(series: str, n: int) -> list[list[Message]]:
    """The same prompts under one long system prompt, which each series has for itself."""
    system = Message("system", f"You tell stories about these: {words(series, SYSTEM_WORDS)}.")
    return [[system, *prompt] for prompt in short(series, n)]


def history(series: str) -> list[Message]:
    """The first turn of a long conversation."""
    return [Message("user", f"Read these words: {words(series, HISTORY_WORDS)}. Which one do you like best?")]


def next_turn(turns: Sequence[Message], answer: str, number: int) -> list[Message]:
    return [*turns, Message("assistant", answer), Message("user", f"Tell me more, part {number}.")]


def words(series: str, n: int) -> str:
    draw = random.Random(series)  # noqa: S311 - the same in each run
    return " ".join(draw.choice(WORDS) for _ in range(n))
