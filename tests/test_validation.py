"""Whole replies against schemas to which no grammar could hold them."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from llamalith_app.errors import ValidatorBusy
from llamalith_app.grammars import grammar, keywords, validation
from llamalith_app.jobs import schemas
from llamalith_app.jobs.schemas import Fit, ReplyValidator
from llamalith_app.supervise import program

DRAFT_7 = "http://json-schema.org/draft-07/schema#"
IPV4 = {"type": "string", "format": "ipv4"}
CONDITION = {"if": {"properties": {"a": {"format": "email"}}}, "then": {"required": ["b"]}}
CASES: list[tuple[Any, str, str]] = [
    ({"uniqueItems": True}, "[1,2]", ""),
    ({"uniqueItems": True}, "[1,1]", "at #: [1,1] has non-unique elements"),
    ({"properties": {"a/b": {"items": {"not": {"const": 1}}}}}, '{"a/b":[2,1]}', "at #/a~1b/1: "),
    ({"pattern": r"\bfoo\b"}, '"a foo b"', ""),
    ({"pattern": r"\bfoo\b"}, '"afoo"', "does not match"),
    ({"$schema": "https://example.com/x", "$id": "https://example.com/y", "not": {}}, "1", "at #: "),
    ({"uniqueItems": True}, '["a', "is no JSON: "),
    ({"type": "array", "uniqueItems": True}, json.dumps(["x" * 100_000] * 2), "at #: "),
    ({"oneOf": [IPV4, {"type": "string", "format": "ipv6"}]}, '"1.2.3.4"', ""),
    ({"oneOf": [IPV4, {"type": "string", "format": "ipv6"}]}, '"abc"', "at #: "),
    ({"oneOf": [{"format": "date"}, {"format": "date-time"}]}, '"2020-01-01"', ""),
    ({"type": "string", "not": {"format": "ipv4"}}, '"abc"', ""),
    ({"type": "string", "not": {"format": "ipv4"}}, '"1.2.3.4"', "at #: "),
    ({"$schema": "http://json-schema.org/draft-04/schema", "not": {"format": "uuid"}}, '"abc"', ""),
    ({"type": "string", "not": {"format": "ipv6"}}, '"::ffff:1.2.3.4"', "at #: "),
    (CONDITION, '{"a":"abc"}', ""),
    *(
        ({"$schema": draft, key: {name: ["b"]}}, f'{{"{name}":1}}', '"b" is a required property')
        for draft, key in (
            ("https://json-schema.org/draft/2020-12/schema", "dependentRequired"),
            (DRAFT_7, "dependencies"),
        )
        for name in ("then", "$id", "propertyNames", "a")
    ),
    ({"$schema": DRAFT_7, "dependencies": {"then": {"required": ["b"]}}}, '{"then":1}', "is a required property"),
    ({"$schema": DRAFT_7, "dependencies": {"a": {"format": "regex", "then": False}}}, '{"a":1}', ""),
    (CONDITION, '{"a":"abc@example.com"}', '"b" is a required property'),
]


@pytest.mark.parametrize(("schema", "reply", "problem"), CASES)
def test_the_first_part_of_a_reply_that_does_not_fit_is_reported(schema: Any, reply: str, problem: str) -> None:
    found = validation.problem(schema, reply)
    assert problem in found
    assert bool(found) == bool(problem)
    assert len(found) < 1000


WRITTEN = {
    "date": ["2020-01-01", "2023-02-29"],
    "date-time": ["2020-01-01T13:25:60Z", "2023-02-29T00:00:00z"],
    "duration": ["P1Y2M3DT4H5M6S", "P2W"],
    "email": ["a" * 65 + "@example.com", "a@[87.6.39.99]"],
    "hostname": ["u---8", "a.example"],
    "ipv4": ["1.2.3.4"],
    "ipv6": ["::1", "1:2:3:4:5:6:7:8"],
    "time": ["01:06:60z", "12:00:00.5+01:00"],
    "uri": ["https://example.com/?q#x", "a:"],
    "uuid": ["00000000-0000-0000-0000-00000000000a"],
}


@pytest.mark.parametrize("name", keywords.FORMATS)
def test_what_may_be_written_where_a_format_stands_is_valid(name: str) -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "string", "format": name}}
    reply = json.dumps(WRITTEN[name], separators=(",", ":"))
    matcher = LLMatcher(LLTokenizer("byte"), grammar.from_schema(schema, ["#/uniqueItems"]), log_level=0)
    assert matcher.try_consume_tokens(list(reply.encode())) == len(reply)
    assert validation.problem(schema, reply) == ""
    assert "at #/0: " in validation.problem(schema, '["no such thing: "]')


@pytest.mark.parametrize(
    ("schema", "at"),
    [
        ({"pattern": "("}, "#/pattern"),
        ({"properties": {"a": {"uniqueItems": 1}}}, "#/properties/a/uniqueItems"),
        ({"not": {"$ref": "http://127.0.0.1/x"}}, "#"),
        ({"not": {"$ref": "#/$defs/x"}}, "#"),
    ],
)
def test_a_schema_that_nothing_can_be_validated_against_is_reported(schema: Any, at: str) -> None:
    flaw = validation.schema_flaw(schema)
    assert flaw is not None
    assert flaw.at == at


EVIL: dict[str, tuple[Any, str]] = {
    "backtracking": ({"pattern": r"^(?=a)((a|aa)+)+\1$"}, json.dumps("a" * 50_000 + "b")),
    "many of those": (
        {"items": {"pattern": r"^(?!b)(a|aa|(a+)+)+(?<=c)\2$"}},
        json.dumps(["a" * 200 + "b"] * 20_000),
    ),
    "nesting": ({"uniqueItems": True}, "[" * 100_000),
    "a long number": ({"uniqueItems": True}, "[" + "9" * 5000 + "]"),
}


@pytest.mark.parametrize(("schema", "reply"), EVIL.values(), ids=EVIL.keys())
async def test_a_validation_that_means_harm_ends_in_time_and_raises_nothing(schema: Any, reply: str) -> None:
    fit = await ReplyValidator().validate(schema, reply)
    assert fit.is_valid is not True
    assert fit.problem


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
async def test_a_death_from_outside_says_nothing_of_a_schema_or_a_reply(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    run, n_killed = program.run, 0

    async def run_and_kill(module: str, text: bytes) -> program.ProgramResult:
        nonlocal n_killed
        n_killed += 1
        return program.ProgramResult(b"", b"", -number) if n_killed == 1 else await run(module, text)

    monkeypatch.setattr(program, "run", run_and_kill)
    assert await ReplyValidator().validate({"uniqueItems": True}, "[1, 1]") != Fit(None, "could not be validated")
    n_killed = 0
    with pytest.raises(ValidatorBusy):
        await schemas._compute_verdict(b"{}")


async def test_a_validation_without_an_end_leaves_it_open_whether_the_reply_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert await ReplyValidator(timeout_s=0).validate({}, "1") == Fit(None, "could not be validated within 0 s")
    monkeypatch.setattr("llamalith_app.supervise.program.sys.executable", "/nowhere")
    assert await ReplyValidator().validate({}, "1") == Fit(None, "could not be validated")
    monkeypatch.undo()
    assert await ReplyValidator().validate({}, "1") == Fit(True, None)
