"""What a reply's sampling may be set to: types with their limits, for `config.json` and for a job alike.

Owns the limits and the words in which people are told of them. Knows neither who sets them nor what they do.
"""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from msgspec import Meta

TELL_LIMITS_BELOW = 1_000_000
"""Higher ones are there against nonsense: told only to who went beyond them."""
LONE_TEXT = "lone_text"
"""Marks a list that may be one text instead."""
WORDS = {NoneType: "null", str: "text", int: "whole number", float: "number", bool: "boolean"}

MaxTokens = Annotated[int, Meta(ge=1, le=1_048_576, description="Tokens that a reply has at most.")]
Temperature = Annotated[float, Meta(ge=0, le=5, description="0: always the likeliest token.")]
Share = Annotated[float, Meta(ge=0, le=1)]
ShareAboveZero = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=0, le=1_000_000, description="0: all tokens.")]
RepeatPenalty = Annotated[float, Meta(gt=0, le=5, description="1: none.")]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1, description="Unset: another one for each job.")]
StopText = Annotated[str, Meta(title="text of 1 to 64 characters", min_length=1, max_length=64)]
Stops = Annotated[
    tuple[StopText, ...],
    Meta(
        title="text, or a list of at most 16",
        description="A reply ends before the first of these.",
        max_length=16,
        extra={LONE_TEXT: True},
    ),
]


def in_words(wanted: Any, found: Any = None) -> str:
    """What a type allows, for the person who gave `found`; without it, all of its limits."""
    if words := title(wanted):
        return words
    bare = get_args(wanted)[0] if get_origin(wanted) is Annotated else wanted
    if get_origin(bare) is Literal:
        return f"one of {', '.join(get_args(bare))}"
    if bare is wanted:
        return WORDS[wanted]
    meta = wanted.__metadata__[0]
    beyond = found is None or (isinstance(found, (int, float)) and meta.le is not None and found > meta.le)
    limits = [
        f"{sign} {limit}"
        for sign, limit in (("≥", meta.ge), (">", meta.gt), ("≤", meta.le))
        if limit is not None and (limit < TELL_LIMITS_BELOW or (sign == "≤" and beyond))
    ]
    return f"{WORDS[bare]} {' and '.join(limits)}".rstrip()


def title(wanted: Any) -> str:
    """The words that a type brings along, or none."""
    if get_origin(wanted) is not Annotated:
        return ""
    titles = [meta.title for meta in wanted.__metadata__ if meta.title]
    return titles[-1] if titles else ""


def takes_lone_text(wanted: Any) -> bool:
    metas = wanted.__metadata__ if get_origin(wanted) is Annotated else ()
    return any(LONE_TEXT in (meta.extra or {}) for meta in metas)


def without_none(wanted: Any) -> Any:
    if get_origin(wanted) in (Union, UnionType):
        (wanted,) = (member for member in get_args(wanted) if member is not NoneType)
    return wanted
