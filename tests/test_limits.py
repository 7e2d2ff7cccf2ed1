"""Limits stand in types. What messages and documents say of them is derived, or compared with them here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from litestar import Litestar
from litestar.routes import HTTPRoute
from msgspec import Meta

from llamalith_app.contracts import forms, jobs, parameters, text
from llamalith_app.controllers.conversations import Conversations
from llamalith_app.controllers.jobs import Jobs
from llamalith_app.grammars import schema, subschemas
from llamalith_app.settings import declaration, ranges
from llamalith_app.web import problems
from llamalith_app.web.request import MAX_BODY_BYTES, AppRequest

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
STRUCTS = (
    *(jobs.JobCreate, jobs.ReplyCreate, jobs.LegacySubmit, parameters.NamedSchema, forms.JobForm),
    *(declaration.Settings, declaration.ModelSettings, declaration.WorkerSettings, declaration.MaxWait),
)
ROUTES = Litestar([Jobs, Conversations], request_class=AppRequest, openapi_config=None, logging_config=None).routes
"""Those whose parameters have limits that pages mention."""


def fields() -> Iterator[tuple[str, Any]]:
    """Every field of a request or a setting, and every parameter, with its type."""
    handlers = [handler for route in ROUTES if isinstance(route, HTTPRoute) for handler in route.route_handlers]
    structs: list[type[msgspec.Struct]] = [*STRUCTS, *(handler.signature_model for handler in handlers)]
    for struct in structs:
        for field in msgspec.structs.fields(struct):
            yield field.encode_name, field.type


LIMITED = {
    name: member for name, wanted in fields() for member in ranges.members(wanted) if ranges.describes_itself(member)
}
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
RANGE_PATTERNS = (
    # `max_attempts` … 1 to 100
    re.compile(rf"(?P<least>{NUMBER}) to (?P<most>{NUMBER}|a year|a week)"),
    # `temperature` … a number ≥ 0 and ≤ 5
    re.compile(rf"≥ (?P<least>{NUMBER})(?: and ≤ (?P<most>{NUMBER}))?"),
    re.compile(rf"> (?P<above>{NUMBER})(?: and ≤ (?P<most>{NUMBER}))?"),
    # `timeout_s` … more than 0, at most 604,800
    re.compile(rf"(?:more than (?P<above>{NUMBER}),? (?:and )?)at most (?P<most>{NUMBER})"),
)
NAMED_NUMBERS = {"a year": ranges.YEAR_S, "a week": ranges.WEEK_S}


def ranges_in(page: str) -> Iterator[tuple[str, dict[str, float]]]:
    """The ranges that a page gives: in a table's row that begins with the field, or in brackets behind the field."""
    places = [
        *re.findall(r"^\| `(\w+)` \|(.*)\|$", page, re.MULTILINE),
        *re.findall(r"`(\w+)` \(([^)`]*)\)", page),
    ]
    for name, words in places:
        for pattern in RANGE_PATTERNS:
            if real_range(name) and (found := pattern.search(words)):
                yield name, {key: number(value) for key, value in found.groupdict().items() if value is not None}
                break


def number(word: str) -> float:
    return NAMED_NUMBERS.get(word) or float(word.replace(",", ""))


def real_range(name: str) -> dict[str, float]:
    """Empty: it is no number of ours."""
    wanted = LIMITED.get(name)
    limits = {
        "least": ranges.limit(wanted, "ge"),
        "above": ranges.limit(wanted, "gt"),
        "most": ranges.limit(wanted, "le"),
    }
    return {key: value for key, value in limits.items() if value is not None}


def wrong_ranges(page: str) -> list[str]:
    return [
        f"{name}: {found_range}, really {real_range(name)}"
        for name, found_range in ranges_in(page)
        if any(real_range(name).get(key) != value for key, value in found_range.items())
    ]


@pytest.mark.parametrize("page", PAGES)
def test_a_range_in_a_page_is_that_of_the_type(page: str) -> None:
    assert wrong_ranges(PAGES[page]) == []


def test_pages_contain_ranges() -> None:
    """Else nothing would be compared: at least that of the list's limit."""
    assert ("limit", {"least": 1, "most": 500}) in [found for page in PAGES.values() for found in ranges_in(page)]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("a `limit` (1 to 501, default 100)", True),
        ("a `limit` (1 to 500, default 100)", False),
        ("| `max_attempts` | attempts; 1 to 99 | 3 |", True),
        ("| `temperature` | a number ≥ 0 and ≤ 4 | 0.7 |", True),
        ("| `top_p` | a number > 0 and ≤ 1 | 0.95 |", False),
        ("| `top_p` | a number ≥ 0 and ≤ 1 | 0.95 |", True),
        ("| `timeout_s` | seconds; more than 0, at most 604,801 | none |", True),
        ("| `timeout_s` | seconds; more than 0, at most 604,800 | none |", False),
        ("| `idle_unload_s` | seconds | 0 to a year | 600 |", False),
        ("| `idle_unload_s` | seconds | 0 to a week | 600 |", True),
        ("| `n_ctx` | tokens | 256 to 1,048,577 | 4096 |", True),
    ],
)
def test_a_wrong_range_in_a_page_would_be_found(line: str, wrong: bool) -> None:
    assert bool(wrong_ranges(line)) is wrong


PHRASES = (
    (r"id\W* (?:is|may be) any text of (\d+) to ([\d,]+) characters", (1, text.MAX_NAME)),
    (r"at most ([\d,]+) characters[;,]? (?:no NUL|placed|stored)", (text.MAX_TEXT,)),
    (r"body is .{0,80}?at most (\d+) MiB", (MAX_BODY_BYTES // 2**20,)),
    (r"`Idempotency-Key` \((\d+) to (\d+) visible ASCII characters\)", (1, text.MAX_KEY)),
    (r"list of at most (\d+)", (ranges.MAX_STOPS,)),
    (r"each (\d+) to (\d+) characters", (1, ranges.MAX_STOP_CHARACTERS)),
    (r"schema has at most (\d+) KB", (schema.MAX_SCHEMA_BYTES // 1024,)),
    (r"nested at most (\d+) deep", (subschemas.MAX_DEPTH,)),
)
"""What pages say in sentences."""


@pytest.mark.parametrize(("phrase", "real"), PHRASES)
def test_a_limit_in_a_sentence_is_that_of_the_type(phrase: str, real: tuple[int, ...]) -> None:
    found = [match for content in PAGES.values() for match in re.finditer(phrase, " ".join(content.split()))]
    # A phrase that no page has any more would compare nothing.
    assert found or "docs/api.md" not in PAGES
    for match in found:
        assert tuple(int(number(word)) for word in match.groups()) == real, match[0]


def test_the_documents_description_of_a_schema_has_the_limits_that_are_enforced() -> None:
    description = ranges.limit(parameters.Schema, "description")
    assert f"at most {schema.MAX_SCHEMA_BYTES:,} bytes, nested at most {subschemas.MAX_DEPTH} deep" in description


# ---- words of types


class Inner(msgspec.Struct, tag_field="kind", tag="inner"):
    weight: Annotated[float, Meta(gt=0, le=2)]


class Other(msgspec.Struct, tag_field="kind", tag="other"):
    note: str | None = None


class Outer(msgspec.Struct):
    word: Literal["a", "b"] | None = None
    words: Annotated[list[Literal["a", "b"]], Meta(max_length=2)] = []
    flag: bool = False
    part: Inner | Other | None = None
    parts: list[Inner] = []
    name: Annotated[str, Meta(max_length=3)] = ""
    id: Annotated[str, Meta(title="an id")] | Annotated[int, Meta(title="a whole number")] | None = None
    count: Annotated[int, Meta(ge=1, le=2**63 - 1)] = 1


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({"word": "c"}, "word: expected one of a, b"),
        ({"words": ["c"]}, "words[0]: expected one of a, b; at most 2 of them"),
        ({"words": ["a"] * 3}, "words: expected one of a, b; at most 2 of them"),
        ({"flag": 3}, "flag: expected true or false"),
        ({"part": {"kind": "third"}}, "part.kind: expected one of inner, other"),
        ({"part": {}}, "part.kind: missing; expected one of inner, other"),
        ({"part": {"kind": "inner", "weight": 3}}, "part.weight: expected a number > 0 and ≤ 2"),
        ({"part": {"kind": "inner"}}, "part.weight: missing; expected a number > 0 and ≤ 2"),
        ({"part": {"kind": "other", "note": 3}}, "part.note: expected a string or null, got a number"),
        ({"part": 3}, "part: expected an object or null, got a number"),
        ({"parts": [{"weight": 1}, {"weight": 0}]}, "parts[1].weight: expected a number > 0 and ≤ 2"),
        ({"name": "abcd"}, "name: expected a string of at most 3 characters"),
        ({"id": []}, "id: expected an id, or a whole number"),
        ({"count": 0}, "count: expected a whole number ≥ 1 and ≤ 9223372036854775807"),
        ([], "The body is wrong: expected an object, got a list"),
    ],
)
def test_a_wrong_field_is_refused_with_the_limits_of_its_type(sent: object, expected: str) -> None:
    with pytest.raises(msgspec.ValidationError) as refused:
        msgspec.convert(sent, Outer)
    assert problems.explained(str(refused.value), Outer) == expected


def test_every_number_of_a_request_and_of_a_setting_has_limits() -> None:
    numbers = {
        name
        for name, wanted in fields()
        for member in ranges.members(wanted)
        if ranges.without_limits(member) in (int, float) and ranges.limit(member, "le") is None
    }
    assert numbers == set()


def test_a_parameter_keeps_its_limits_where_litestar_finds_them() -> None:
    """Litestar drops those of `Meta` beside a parameter of its own: they must stand in the parameter."""
    assert ranges.in_words(LIMITED["limit"]) == "a whole number ≥ 1 and ≤ 500"
    assert ranges.in_words(LIMITED["job_id"]) == "a whole number ≥ 1 and ≤ 9223372036854775807"


def test_an_empty_choice_is_not_listed() -> None:
    """A form sends it where nothing was chosen."""
    assert ranges.in_words(Literal["a", "b", ""]) == "one of a, b"
