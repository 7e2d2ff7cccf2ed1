"""The limits of numbers, lists and stop strings, and the words in which messages describe them.

A limit stands in its type and nowhere else: `config.json`, the environment, requests and their error texts all read it
from there. Knows no setting and no request.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import Meta

SHOW_LIMITS_BELOW = 1_000_000
"""Higher limits only keep out nonsense: a message shows them to those who exceeded them."""
LISTS = (list, tuple)
LONE_TEXT = "lone_text"
"""Marks a list that may be one text instead."""
UNIT = "unit"
"""Names, in a type's `extra`, what its numbers count."""
KINDS = {NoneType: "null", str: "text", int: "a whole number", float: "a number", bool: "true or false"}

WEEK_S = 604_800
YEAR_S = 31_536_000
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 64

Seconds = Annotated[float, Meta(gt=0, le=WEEK_S, extra={UNIT: "seconds"})]
"""How long a job may wait or run."""
LongSeconds = Annotated[float, Meta(ge=0, le=YEAR_S, extra={UNIT: "seconds"})]
MaxAttempts = Annotated[int, Meta(ge=1, le=100)]

MaxTokens = Annotated[int, Meta(ge=1, le=1_048_576, description="Tokens that a reply has at most.")]
Temperature = Annotated[float, Meta(ge=0, le=5, description="0: always the likeliest token.")]
Share = Annotated[float, Meta(ge=0, le=1)]
ShareAboveZero = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=0, le=1_000_000, description="0: all tokens.")]
RepeatPenalty = Annotated[float, Meta(gt=0, le=5, description="1: none.")]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1, description="Unset: another one for each job.")]
StopText = Annotated[
    str,
    Meta(
        title=f"text of 1 to {MAX_STOP_CHARACTERS} characters",
        min_length=1,
        max_length=MAX_STOP_CHARACTERS,
    ),
]
StopList = Annotated[
    tuple[StopText, ...],
    Meta(
        title=f"a list of at most {MAX_STOPS} such texts",
        description="A reply ends before the first of these.",
        max_length=MAX_STOPS,
    ),
]
Stops = Annotated[StopList, Meta(title=f"text, or a list of at most {MAX_STOPS}", extra={LONE_TEXT: True})]


def in_words(wanted: Any, found: Any = None) -> str:
    """What a type allows, for the person who typed `found`; without it, all of the limits."""
    if is_union(wanted):
        return ", or ".join(filter(None, dict.fromkeys(in_words(member, found) for member in members(wanted))))
    if words := title(wanted):
        return words
    bare = without_limits(wanted)
    if get_origin(bare) is Literal:
        # An empty choice is how a form says that nothing was chosen.
        choices = ", ".join(filter(None, get_args(bare)))
        return f"one of {choices}" if choices else ""
    if get_origin(bare) in LISTS:
        most = limit(wanted, "max_length")
        return f"{in_words(get_args(bare)[0], found)}{f'; at most {most} of them' if most else ''}"
    most = limit(wanted, "le")
    is_above = found is None or (isinstance(found, (int, float)) and most is not None and found > most)
    limits = [
        f"{sign} {number}"
        for sign, name in (("≥", "ge"), (">", "gt"), ("≤", "le"))
        if (number := limit(wanted, name)) is not None
        if number < SHOW_LIMITS_BELOW or (name == "le" and is_above)
    ]
    unit = marked(wanted, UNIT)
    return f"{KINDS[bare]} {f'of {unit} ' if unit else ''}{' and '.join(limits)}".rstrip()


def describes_itself(wanted: Any) -> bool:
    """True if `in_words` says more of a type than its kind."""
    if is_union(wanted):
        return all(describes_itself(member) for member in members(wanted))
    bare = without_limits(wanted)
    if get_origin(bare) in LISTS:
        return bool(title(wanted)) or describes_itself(get_args(bare)[0])
    return (
        bool(title(wanted))
        or bare is bool
        or get_origin(bare) is Literal
        or any(limit(wanted, name) is not None for name in ("ge", "gt", "le"))
    )


def type_at(root: Any, place: str) -> Any:
    """The type of the field at a place such as `response_format.name`, from a struct's type on; None: no field is known
    there. An item of a list is described by its list: `stop[0]` is `stop`; and so is a value of an object with free
    names, which msgspec calls `[...]`."""
    wanted, of_item = root, ""
    for step in place.replace("[...]", "[]").split("."):
        alternatives = [without_limits(member) for member in members(wanted)]
        if of_item:
            alternatives = [without_limits(get_args(bare)[0]) for bare in alternatives if get_origin(bare) in LISTS]
        name, of_item, _ = step.partition("[")
        wanted = _field_type([bare for bare in alternatives if is_struct(bare)], name)
    return wanted


def _field_type(structs: Sequence[Any], name: str) -> Any:
    """The type of a field that one of these structs has, or all of the tags if the name is that of the tag."""
    if tags := [struct.__struct_config__.tag for struct in structs if struct.__struct_config__.tag_field == name]:
        return Literal.__getitem__(tuple(tags))
    fields = [field for struct in structs for field in msgspec.structs.fields(struct)]
    return next((field.type for field in fields if field.encode_name == name), None)


def title(wanted: Any) -> str:
    """The type's own words, or nothing."""
    return limit(wanted, "title") or ""


def limit(wanted: Any, name: str) -> Any:
    """One of the fields of a type's `Meta`; None if it has none. The outermost wins, as with msgspec."""
    found = [value for meta in metas(wanted) if (value := getattr(meta, name)) is not None]
    return found[-1] if found else None


def metas(wanted: Any) -> list[Meta]:
    annotations = wanted.__metadata__ if get_origin(wanted) is Annotated else ()
    return [meta for meta in annotations if isinstance(meta, Meta)]


def marked(wanted: Any, name: str) -> Any:
    """What a type's `extra` holds under this name; None: nothing."""
    found = [(meta.extra or {}).get(name) for meta in metas(wanted)]
    return next((value for value in found if value is not None), None)


def takes_lone_text(wanted: Any) -> bool:
    return bool(marked(wanted, LONE_TEXT))


def without_limits(wanted: Any) -> Any:
    return get_args(wanted)[0] if get_origin(wanted) is Annotated else wanted


def is_struct(wanted: Any) -> bool:
    return isinstance(wanted, type) and issubclass(wanted, msgspec.Struct)


def is_union(wanted: Any) -> bool:
    return get_origin(wanted) in (Union, UnionType)


def members(wanted: Any) -> Sequence[Any]:
    """The types that a union allows, without None; of another type itself."""
    return [member for member in get_args(wanted) if member is not NoneType] if is_union(wanted) else [wanted]


def without_none(wanted: Any) -> Any:
    """The type itself, or the one member of `T | None`."""
    (wanted,) = members(wanted)
    return wanted
