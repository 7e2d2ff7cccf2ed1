"""Replies of the real model that are held to a form, and grammars that mean harm."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import validate

from llamalith_app.engine.client.protocol import EngineRefused
from llamalith_app.engine.constraint import Constraint, GrammarFailed, Timings, Vocabulary
from llamalith_app.engine.messages import Submit
from llamalith_app.engine.runner import LlamaRunner
from llamalith_app.engine.runner_protocol import Refusal
from llamalith_app.grammars import grammar, schema
from tests import tiny_models
from tests.engine.conftest import load, run, started, submit

pytestmark = pytest.mark.slow

DRAGON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "colour": {"enum": ["red", "green"]},
        "age": {"type": "integer", "minimum": 1, "maximum": 999},
        "friends": {"type": "array", "items": {"$ref": "#/$defs/friend"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "colour", "age", "friends"],
    "additionalProperties": False,
    "$defs": {
        "friend": {
            "type": "object",
            "properties": {"name": {"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"}},
            "required": ["name"],
            "additionalProperties": False,
        }
    },
}


def bound(prompt: str, schema: Any, **changed: Any) -> Submit:
    return msgspec.structs.replace(submit(prompt, **changed), grammar=grammar.from_schema(schema))


async def test_a_token_that_writes_nothing_is_no_text_to_a_schema(tmp_path: Path) -> None:
    path = tiny_models.write(tmp_path / "model.gguf", "llama", unknown="<unk>")
    schema = {"enum": ["<unk>", "<none>"]}
    async with started(None, path=str(path)) as engine:
        replies = [(await run(engine, bound("x", schema, temperature=5.0, seed=seed))).text for seed in range(20)]
    assert {json.loads(reply) for reply in replies} <= {"<unk>", "<none>"}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_a_reply_fits_the_schema_that_it_is_held_to(temperature: float) -> None:
    async with started(None) as engine:
        reply = await run(engine, bound("Describe a dragon.", DRAGON, temperature=temperature, seed=5, max_tokens=300))
    assert reply.finish == "stop"
    validate(json.loads(reply.text), DRAGON)


async def test_a_reply_that_max_tokens_cut_before_its_json_closed_says_so() -> None:
    async with started(None) as engine:
        reply = await run(engine, bound("Describe a dragon.", DRAGON, max_tokens=6))
    assert reply.finish == "length"
    assert reply.text.startswith("{")
    with pytest.raises(json.JSONDecodeError):
        json.loads(reply.text)


EXPONENTIAL = 'root ::= s\ns ::= s s | s s s | [a-z ] | ""'


async def test_an_exponential_grammar_ends_its_own_sequence_only() -> None:
    async with started(None, n_slots=2) as engine:
        other = asyncio.create_task(run(engine, submit("List three fruits.", max_tokens=60)))
        with pytest.raises(EngineRefused, match="The grammar takes") as refused:
            await run(engine, submit("Write a story.", grammar=EXPONENTIAL, max_tokens=600))
        assert refused.value.kind == "grammar"
        assert (await other).text
        assert not engine.died.is_set()


@pytest.fixture(scope="module")
def vocabulary() -> Iterator[Vocabulary]:
    runner = LlamaRunner(load(), lambda _: None)
    yield runner._vocabulary
    runner.close()


def test_a_grammar_that_takes_too_long_to_compile_is_refused(vocabulary: Vocabulary) -> None:
    # Takes seconds, and no longer than that: nothing interrupts it.
    slow = {"type": "array", "prefixItems": [{"type": "integer", "multipleOf": 997 + number} for number in range(150)]}
    with pytest.raises(Refusal, match="to compile") as refusal:
        Constraint(vocabulary, grammar.from_schema(slow), Timings(compile_s=0.05))
    assert refusal.value.kind == "grammar"


def test_a_token_that_takes_too_long_to_check_is_the_last(vocabulary: Vocabulary) -> None:
    bounded = Constraint(vocabulary, grammar.from_schema({"type": "object"}), Timings(step_cpu_s=0.0))
    with pytest.raises(GrammarFailed, match="a token"):
        bounded.allowed()


def wide(n_names: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(n_names)}}


WIDE: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "an object": lambda n: (wide(n), dict.fromkeys(wide(n)["properties"], "x")),
    "an object of these alone": lambda n: (
        wide(n) | {"additionalProperties": False},
        dict.fromkeys(wide(n)["properties"], "x"),
    ),
    "one that may be absent": lambda n: (
        {"type": "object", "properties": {"a": {}, "b": wide(n)}},
        {"b": dict.fromkeys(wide(n)["properties"], "x")},
    ),
    "one of several": lambda n: ({"anyOf": [{"type": "null"}, wide(n)]}, dict.fromkeys(wide(n)["properties"], "x")),
    "one of which some must be there": lambda n: (
        wide(n) | {"minProperties": 1, "additionalProperties": False},
        dict.fromkeys(wide(n)["properties"], "x"),
    ),
    "tagged ones": lambda n: (
        {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": f"k{number}"}, "a": {}, "b": {}},
                    "required": ["kind"],
                }
                for number in range(n // 3)
            ]
        },
        {"kind": "k1", "b": []},
    ),
}


@pytest.mark.parametrize("made", WIDE.values(), ids=WIDE.keys())
def test_what_is_taken_at_submit_the_engine_does_not_refuse_whatever_its_size(
    vocabulary: Vocabulary, made: Callable[[int], tuple[Any, Any]]
) -> None:
    for n_names in (40, 60, 250, 1000):
        asked, reply = made(n_names)
        *_, verdict = schema.validate(asked)
        assert verdict.reason is None, n_names
        bounded = Constraint(vocabulary, grammar.from_schema(asked, [gap.at for gap in verdict.gaps]))
        text = json.dumps(reply, separators=(",", ":"))
        for token in vocabulary.tokenizer.tokenize_str(text)[:16]:
            assert bounded.allowed()[token]
            bounded.accept(token)


TYPICAL = json.loads(Path(__file__).parent.parent.joinpath("typical_schemas.json").read_text())
"""As zod, pydantic and OpenAPI write them, with the places of what no reply can be held to."""


@pytest.mark.parametrize("typical", TYPICAL, ids=[typical["name"] for typical in TYPICAL])
def test_a_typical_schema_is_taken_and_the_engine_holds_to_it(vocabulary: Vocabulary, typical: dict[str, Any]) -> None:
    *_, verdict = schema.validate(typical["schema"])
    assert verdict.reason is None
    assert sorted(gap.at for gap in verdict.gaps) == typical["unenforced"]
    bounded = Constraint(vocabulary, grammar.from_schema(typical["schema"], typical["unenforced"]))
    for _ in range(3):
        allowed = bounded.allowed().nonzero()[0]
        assert len(allowed)
        bounded.accept(int(allowed[0]))


def test_what_the_engine_refuses_is_not_taken_at_submit(vocabulary: Vocabulary) -> None:
    bounded = Constraint(vocabulary, grammar.from_schema(wide(1300)))
    bounded.allowed()
    opening, *_ = vocabulary.tokenizer.tokenize_str('{"p')
    with pytest.raises(GrammarFailed, match="too many choices at one place"):
        bounded.accept(opening)
    *_, verdict = schema.validate(wide(1300))
    assert "too many choices at one place" in (verdict.reason or "")


def test_only_what_a_grammar_allows_may_come_next_and_the_end_only_at_its_end(vocabulary: Vocabulary) -> None:
    bounded = Constraint(vocabulary, grammar.from_gbnf('root ::= "a"'))
    (a,) = vocabulary.tokenizer.tokenize_str("a")
    assert bounded.allowed().nonzero()[0].tolist() == [a]
    assert bounded.allows(a)
    assert not any(bounded.allows(end) for end in vocabulary.ends)
    bounded.accept(a)
    assert set(bounded.allowed().nonzero()[0].tolist()) == vocabulary.ends
    assert not bounded.allows(a)
    assert all(bounded.allows(end) for end in vocabulary.ends)


def test_no_grammar_allows_a_control_token_by_its_name(vocabulary: Vocabulary) -> None:
    bounded = Constraint(vocabulary, grammar.from_gbnf('root ::= "<|im_start|>" .*'))
    (start,) = vocabulary.tokenizer.tokenize_str("<|im_start|>", parse_special=True)
    assert not bounded.allows(start)


async def test_a_stop_string_ends_a_reply_before_it() -> None:
    async with started(None) as engine:
        whole = await run(engine, submit("Count from one to ten.", max_tokens=40))
        middle = whole.text[10:14]
        cut = await run(engine, submit("Count from one to ten.", max_tokens=40, stop=[middle]))
    assert cut.finish == "stop"
    assert cut.text == whole.text[: whole.text.index(middle)]
