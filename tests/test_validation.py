"""Whole replies against schemas to which no grammar could hold them."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from llamalith_app import validation
from llamalith_app.errors import JudgeBusy
from llamalith_app.jobs import schemas
from llamalith_app.jobs.schemas import Fit, ReplyValidator

CASES: list[tuple[Any, str, str]] = [
    ({"uniqueItems": True}, "[1,2]", ""),
    ({"uniqueItems": True}, "[1,1]", "at #: [1,1] has non-unique elements"),
    ({"properties": {"a/b": {"items": {"not": {"const": 1}}}}}, '{"a/b":[2,1]}', "at #/a~1b/1: "),
    ({"pattern": r"\bfoo\b"}, '"a foo b"', ""),
    ({"pattern": r"\bfoo\b"}, '"afoo"', "does not match"),
    ({"$schema": "https://example.com/x", "$id": "https://example.com/y", "not": {}}, "1", "at #: "),
    ({"uniqueItems": True}, '["a', "is no JSON: "),
    ({"type": "array", "uniqueItems": True}, json.dumps(["x" * 100_000] * 2), "at #: "),
]


@pytest.mark.parametrize(("schema", "reply", "problem"), CASES)
def test_the_first_part_of_a_reply_that_does_not_fit_is_told(schema: Any, reply: str, problem: str) -> None:
    found = validation.problem(schema, reply)
    assert problem in found
    assert bool(found) == bool(problem)
    assert len(found) < 1000


@pytest.mark.parametrize(
    ("schema", "at"),
    [
        ({"pattern": "("}, "#/pattern"),
        ({"properties": {"a": {"uniqueItems": 1}}}, "#/properties/a/uniqueItems"),
        ({"not": {"$ref": "http://127.0.0.1/x"}}, "#"),
        ({"not": {"$ref": "#/$defs/x"}}, "#"),
    ],
)
def test_a_schema_that_nothing_can_be_validated_against_is_told(schema: Any, at: str) -> None:
    flaw = validation.flaw(schema)
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
    run, n_killed = schemas._run, 0

    async def run_and_kill(module: str, text: bytes) -> schemas._Ended:
        nonlocal n_killed
        n_killed += 1
        return schemas._Ended(b"", b"", -number) if n_killed == 1 else await run(module, text)

    monkeypatch.setattr(schemas, "_run", run_and_kill)
    assert await ReplyValidator().validate({"uniqueItems": True}, "[1, 1]") != Fit(None, "could not be validated")
    n_killed = 0
    with pytest.raises(JudgeBusy):
        await schemas._verdict(b"{}")


async def test_a_validation_without_an_end_leaves_it_open_whether_the_reply_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(schemas, "WITHIN_S", 0)
    assert await ReplyValidator().validate({}, "1") == Fit(None, "could not be validated within 0 s")
    monkeypatch.undo()
    monkeypatch.setattr("llamalith_app.jobs.schemas.sys.executable", "/nowhere")
    assert await ReplyValidator().validate({}, "1") == Fit(None, "could not be validated")
    monkeypatch.undo()
    assert await ReplyValidator().validate({}, "1") == Fit(True, None)
