"""Schemas as clients make them: zod 4 (its own JSON Schema), zod 3 (by zod-to-json-schema) and pydantic. Each stands
with values that its library takes and refuses, and with what of it cannot be enforced while a reply is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from llamalith_app.grammars import grammar, schema, validation

SCHEMAS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("client_schemas.json").read_text())
BYTES = LLTokenizer("byte")


def test_there_are_as_many_as_clients_need() -> None:
    names = [one["name"].split()[0] for one in SCHEMAS]
    assert {name: names.count(name) for name in names} == {"zod4": 162, "zod3": 9, "pydantic": 15}
    assert [one["name"] for one in SCHEMAS if one["refused"]] == ["zod3 cidr", "zod3 never"]


@pytest.mark.parametrize("tenth", range(10))
def test_each_is_taken_and_what_is_enforced_is_told_apart_from_what_is_checked_at_the_end(tenth: int) -> None:
    for one in SCHEMAS[tenth::10]:
        *_, verdict = schema.validate(one["schema"])
        # Nothing fits these two: an address that is one of IPv4 and of IPv6 at once, and a property that never is.
        assert bool(verdict.reason) is one["refused"], (one["name"], verdict.reason)
        if one["refused"]:
            continue
        gaps = sorted(gap.at for gap in verdict.gaps)
        assert gaps == one["unenforced"], one["name"]
        held_to = grammar.from_schema(one["schema"], gaps)
        for value in one["valid"]:
            text = written(one, value)
            assert allows(held_to, text), (one["name"], text)
            assert not gaps or not validation.problem(one["schema"], text), (one["name"], text)
        for value in one["invalid"]:
            text = written(one, value)
            refused = not allows(held_to, text) or (gaps and validation.problem(one["schema"], text))
            assert refused, (one["name"], text)


def written(one: dict[str, Any], value: Any) -> str:
    """As a reply. What is no object stands in one."""
    return json.dumps({"v": value} if one["wrapped"] else value, ensure_ascii=False, separators=(",", ":"))


def allows(held_to: str, text: str) -> bool:
    matcher = LLMatcher(BYTES, held_to, limits=grammar.LIMITS, log_level=0)
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
