"""GBNF as llguidance takes it, the folder of grammars, and the judging of JSON Schemas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from llamalith_app import gbnf, grammar, schema
from llamalith_app.errors import ConfigError


def takes(text: str, reply: str) -> bool:
    """Whether a grammar allows exactly this reply."""
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, grammar.of_gbnf(text), limits=grammar.LIMITS, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(reply.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


MEANINGS: list[tuple[str, list[str], list[str]]] = [
    ('root ::= "yes" | "no"', ["yes", "no"], ["", "y", "yesno", "maybe"]),
    ("root ::= [a-c]+ # letters\n", ["a", "abc"], ["", "d", "abd"]),
    ("root ::= [^a-c]", ["d", "é", "🦊", "\n"], ["a", "", "dd"]),
    ("root ::= .{2}", ["a\n", "🦊é"], ["a", "abc"]),
    (r'root ::= "\x41\u00e9\U0001F98A\"\\\n"', ['Aé🦊"\\\n'], ["A"]),
    (r"root ::= [\]\[^/&~-]*", ["][^/&~-"], ["a"]),
    # The longest match would swallow what comes after it.
    ('root ::= word "end"\nword ::= [a-z]{1,9}', ["xend", "endend", "weekend"], ["end", "x"]),
    ('root ::= "ab" | [a-z] "x"', ["ab", "ax"], ["abx", "a"]),
    ('root ::= "ab"{2}', ["abab"], ["abb", "ab"]),
    ('root ::= "x" "ab"* "c"', ["xc", "xababc"], ["xac", "xabbc"]),
    ('root ::= "x" "ab"{0} "c"', ["xc"], ["xac", "xabc"]),
    ('root ::= "x" "ab"{2}{2}', ["xabababab"], ["xababab", "xab"]),
    ('root ::= ("ab" | "c"){2,3}', ["abc", "ccc", "ababab"], ["ab", "cccc"]),
    ('root ::= "a"?"b"*\n\nunused ::= "x"', ["", "a", "abb"], ["aa"]),
    ('root ::= (\n  "a"\n  | "b"\n) |\n  "c"', ["a", "b", "c"], ["ab"]),
    ('root ::= "x" root | "y"', ["y", "xxxy"], ["x", ""]),
    ('root ::= "(" root ")" | ""', ["", "(())"], ["(", "(()"]),
    ('root ::= item | item "," root\nitem ::= [0-9]+', ["1", "1,22,3"], ["1,", ","]),
    ('root ::= "x" "a"{0} "c"{0,0} ("d" | "e"){0} "f"{2}{0} "g"{0,}', ["x", "xgg"], ["xa", "xc", "xd", "xf"]),
    ('root ::= "a\nb" [c\r\n]+', ["a\nbc", "a\nb\r\n"], ["abc", "anbc"]),
    ('root ::= x ("p" | "q")\nx ::= "a" ("p" | "q")\nx ::= "b" ("r" | "s")', ["brp", "bsq"], ["app", "ap", "bp"]),
    ('my-Rule_2 ::= "a"\nroot ::= my-Rule_2 myRule2\nmyRule2 ::= "b"', ["ab"], ["aa"]),
]


@pytest.mark.parametrize(("text", "good", "bad"), MEANINGS, ids=[text[:30] for text, _, _ in MEANINGS])
def test_a_grammar_means_what_it_means_to_llama_cpp(text: str, good: list[str], bad: list[str]) -> None:
    assert [reply for reply in good if not takes(text, reply)] == []
    assert [reply for reply in bad if takes(text, reply)] == []


def test_a_list_that_recurs_to_its_right_may_be_long() -> None:
    assert takes('root ::= [a-z] root | ""', "abc" * 2000)


WRONG = {
    "no grammar": "line 1: expected NAME ::=",
    'other ::= "a"': "no rule named root",
    "root ::= missing": "no rule named missing",
    'root ::= "abc': "line 1: the text ends within quotes",
    "root ::= [a-z": "line 1: the text ends within quotes",
    'root ::=\n  ("a"': "line 2: expected )",
    'root ::= "a")': "did not expect ')'",
    r'root ::= "\q"': r"no escape \q",
    r'root ::= "\ud800"': r"\ud800 is no character",
    "root ::= [z-a]": "ends before it begins",
    'root ::= "a"{3,2}': "end before they begin",
    'root ::= "a"{x}': "expected {N}",
    'root ::= "a"{100000}': "more than 2000 repetitions",
    "root ::= " + "(" * 50_000: "more than 100 brackets",
}


@pytest.mark.parametrize(("text", "told"), WRONG.items(), ids=[text[:30] for text in WRONG])
def test_what_is_no_grammar_is_told_why(text: str, told: str) -> None:
    with pytest.raises(gbnf.GbnfError) as error:
        gbnf.to_lark(text)
    assert told in str(error.value)


BROKEN = {
    "no grammar": "expected NAME ::=",
    'root ::= root "a"': "allows no reply",
    'root ::= ((("a"{2000}){2000}){2000}){2000} ' + "a " * 5000: "no rule named a",
    "#" + "x" * grammar.MAX_GRAMMAR_BYTES: "More than 100000 bytes, which is the limit",
    "root ::= " + '"a"' + "*" * 5000: "deep",
    "root ::= " + " | ".join(f"[{chr(code)}-{chr(code * 2)}] [^{chr(code)}]" for code in range(200, 3500)): "too big",
}


@pytest.mark.parametrize(("text", "told"), BROKEN.items(), ids=[text[:30] for text in BROKEN])
def test_a_broken_file_of_the_folder_is_named_at_the_start(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "good.gbnf").write_text('root ::= "a"')
    (tmp_path / "bad.gbnf").write_text(text)
    with pytest.raises(ConfigError) as error:
        grammar.load(tmp_path)
    (problem,) = error.value.problems
    assert problem.startswith(f"{tmp_path / 'bad.gbnf'}: ")
    assert told in problem
    assert len(problem) < 1000


def test_what_is_no_file_in_the_folder_is_refused_at_once_and_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.gbnf")
    (tmp_path / "b.gbnf").symlink_to("/dev/zero")
    (tmp_path / "c.gbnf").mkdir()
    with (tmp_path / "d.gbnf").open("wb") as file:
        file.truncate(2**40)
    (tmp_path / "e.gbnf").symlink_to("nowhere")
    with pytest.raises(ConfigError) as error:
        grammar.load(tmp_path)
    assert error.value.problems == [
        f"{tmp_path}/a.gbnf: cannot be read: Not a regular file",
        f"{tmp_path}/b.gbnf: cannot be read: Not a regular file",
        f"{tmp_path}/c.gbnf: cannot be read: Is a directory",
        f"{tmp_path}/d.gbnf: cannot be read: More than 100000 bytes, which is the limit",
        f"{tmp_path}/e.gbnf: cannot be read: No such file or directory",
    ]


def person(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


TREE = {"anyOf": [{"type": "null"}, person(left={"$ref": "#"}, right={"$ref": "#"})]}
GOOD: dict[str, Any] = {
    "anything": {},
    "an object": person(name={"type": "string", "maxLength": 9}, age={"type": "integer", "minimum": 0}),
    "a tree": TREE,
    "a list that may be empty": {"type": "array", "items": {"$ref": "#"}},
    "an optional circle": {"type": "object", "properties": {"next": {"$ref": "#"}}},
    "a reference that is written with escapes": {"$defs": {"a/b %": {"type": "null"}}, "$ref": "#/$defs/a~1b%20%25"},
    "one of two that differ": {"oneOf": [person(kind={"const": "a"}), person(kind={"const": "b"})]},
    "a text of several lines": {"enum": ["a\n\tb", "é\u2028"]},
    "one name more than is required": {"type": "object", "required": ["a"], "minProperties": 2, "maxProperties": 3},
    "keywords that only tell": {"title": "t", "description": "d", "default": 1, "examples": [2], "x-mine": 3},
    "48 objects in one another": json.loads('{"type":"object","properties":{"a":' * 48 + "true" + "}}" * 48),
}


@pytest.mark.parametrize("good", GOOD.values(), ids=GOOD.keys())
def test_a_schema_that_replies_can_be_held_to_is_taken(good: Any) -> None:
    assert list(schema.judge(good)) == [schema.Verdict(reason=None)]


ENDLESS = person(next={"$ref": "#/$defs/e"})
FLAWS: dict[str, tuple[Any, str, str]] = {
    "itself": ({"$ref": "#"}, "#", "circle"),
    "two that are each other": (
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        "#/$defs",
        "circle",
    ),
    "each must hold another": ({"$defs": {"e": ENDLESS}, "$ref": "#/$defs/e"}, "#/$defs/e", "circle"),
    "a list that must not be empty": ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "#/items", "circle"),
    "an optional one that cannot end": (
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/e"}}, "$defs": {"e": ENDLESS}},
        "#/",
        "circle",
    ),
    "nowhere": (person(a={"$ref": "#/$defs/x"}), "#/properties/a/$ref", "leads to nothing"),
    "outside": (person(a={"$ref": "http://127.0.0.1/x"}), "#/properties/a/$ref", "leads out"),
    "a reference that is none": ({"$ref": 5}, "#/$ref", "leads out"),
    "a contradiction": (
        person(a={"items": person(b={"type": "integer", "minimum": 2, "maximum": 1}), "type": "array", "minItems": 1}),
        "#/properties/a/items/properties/b",
        "minimum (2) is greater than maximum (1)",
    ),
    "no such type": (person(a={"type": "text"}), "#/properties/a", "Invalid type: text"),
    "not supported": (person(a={"type": "array", "uniqueItems": True}), "#/properties/a", "not supported: uniqueItems"),
    "behind a reference": (
        {"$defs": {"a/b": {"format": "nope", "type": "string"}}, "type": "array", "items": {"$ref": "#/$defs/a~1b"}},
        "#/$defs/a~1b",
        "Unknown format: nope",
    ),
    "a broken pattern": (person(a={"type": "string", "pattern": "("}), "#/properties/a", "unclosed group"),
    "one of two that may both fit": ({"oneOf": [{"type": "string"}, {"minLength": 2}]}, "#", "anyOf is"),
    "no schema": (person(a=5), "#/properties/a", "is no schema"),
    "an id": (person(a={"$id": "x"}), "#/properties/a/$id", "not supported"),
    "llguidance's own word": ({"x-guidance": {"lenient": True}, "not": {}}, "#/x-guidance", "not supported"),
    "names that one name could stand for": (
        person(a={"type": "object", "required": ["b", "c"], "minProperties": 4}),
        "#/properties/a/minProperties",
        "expected at most 3",
    ),
    "a name with a control character": (
        person(a={"type": "object", "properties": {"a\x01": {}}, "required": ["a\x01"]}),
        "#/properties/a/properties",
        "control character",
    ),
    "a control character": (person(a={"enum": [1, {"b": "\x07"}]}), "#/properties/a/enum/1/b", "control character"),
    "a number like another one": (person(a={"enum": [1, 2**53 + 1]}), "#/properties/a/enum/1", "told from its neigh"),
    "depth": (json.loads('{"items":' * 200 + "{}" + "}" * 200), "#", "nested more than 100 deep"),
}


@pytest.mark.parametrize(("bad", "at", "told"), FLAWS.values(), ids=FLAWS.keys())
def test_a_schema_that_cannot_be_honoured_is_told_with_the_part_that_is_why(bad: Any, at: str, told: str) -> None:
    *_, verdict = schema.judge(bad)
    assert verdict.reason is not None
    assert told in verdict.reason
    assert verdict.at.startswith(at)
    if told != "circle":
        assert verdict.at == at


def two(name: str) -> dict[str, Any]:
    return {"anyOf": [person(**{f"a{name}": {"type": "string"}}), person(**{f"b{name}": {"type": "string"}})]}


EVIL: dict[str, Any] = {
    "patterns of which each must fit": {
        "allOf": [{"type": "string", "pattern": f"(a|b)*{i}(a|b){{{i}}}"} for i in range(30)]
    },
    "many patterns for names": {"patternProperties": {f"^(a|b)*{i}$": {"type": "string"} for i in range(600)}},
    "a large divisor": {"type": "integer", "multipleOf": 999983},
    "choices within each other": {"allOf": [two(str(number)) for number in range(10)]},
}


@pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL.keys())
def test_the_judge_of_an_evil_schema_ends_by_itself(evil: Any) -> None:
    judge = subprocess.run(
        [sys.executable, "-m", "llamalith_app.schema"],
        input=json.dumps(evil).encode(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert judge.returncode != 0 or b'"reason":null' not in judge.stdout


def fits(schema: Any, reply: str) -> bool:
    matcher = LLMatcher(LLTokenizer("byte"), grammar.of_schema(schema), limits=grammar.LIMITS, log_level=0)
    tokens = list(reply.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


MAP = {"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
KEYS: list[tuple[Any, list[str], list[str]]] = [
    (person(age={"type": "integer"}), ['{"age":3,"note":"\\n"}'], [r'{"age":3,"\u0061ge":"old"}']),
    (person(**{"\n\x01é": {"type": "integer"}}), ['{"\\n\\u0001é":3}'], [r'{"\n\u0001é":3,"\u000a\u0001é":""}']),
    (MAP, ['{"ab":1,"b":"x"}'], [r'{"\u0061b":"x"}', '{"ab":"x"}']),
    ({"anyOf": [{"type": "null"}, person(a=MAP)]}, ['{"a":{"ab":1}}'], [r'{"a":{"\u0061b":"x"}}']),
]


@pytest.mark.parametrize(("schema", "good", "bad"), KEYS)
def test_no_key_evades_what_is_said_of_it_by_being_written_with_escapes(
    schema: Any, good: list[str], bad: list[str]
) -> None:
    assert [reply for reply in good if not fits(schema, reply)] == []
    assert [reply for reply in bad if fits(schema, reply)] == []


FRACTIONS = {"type": "number"}
INTEGERS = {"type": "integer"}
BOUNDS: list[tuple[Any, list[str], list[str]]] = [
    (FRACTIONS | {"exclusiveMinimum": 0, "maximum": 0.5}, ["0.001", "0.5"], ["0", "0.0", "-0.1", "0.51"]),
    (FRACTIONS | {"exclusiveMaximum": 1}, ["0", "-7.5", "0.9", "0.99"], ["1", "1.0"]),
    (FRACTIONS | {"minimum": -0.5, "exclusiveMaximum": 0}, ["-0.5", "-0.01"], ["-0", "0", "-0.0", "-0.6"]),
    (FRACTIONS | {"exclusiveMinimum": 0.3, "minimum": 0.1}, ["0.31", "5"], ["0.3", "0.30000000000000000001", "0.2"]),
    (FRACTIONS | {"exclusiveMaximum": True, "maximum": 1}, ["0.9"], ["1"]),
    (FRACTIONS | {"minimum": 0.1, "maximum": 0.25}, ["0.1", "0.25"], ["0.09", "0.26"]),
    (FRACTIONS | {"maximum": 2**62}, ["4611686018427300000"], ["4611686018427388000"]),
    (INTEGERS | {"exclusiveMinimum": 0, "exclusiveMaximum": 3}, ["1", "2"], ["0", "3"]),
    (INTEGERS | {"minimum": 2**53 + 1}, ["9007199254750000"], ["9007199254740992"]),
    (INTEGERS | {"exclusiveMinimum": 2**58}, ["288230376151720000"], ["288230376151711744"]),
    (INTEGERS | {"maximum": 2**63 - 1}, ["9223372036854000000"], ["9223372036854775808"]),
    (INTEGERS | {"minimum": -(2**53), "maximum": 2**53}, ["9007199254740992", "-9007199254740992"], []),
    (INTEGERS | {"maximum": 2**64 - 1}, ["9223372036854775807"], ["18446744073709551616"]),
    (person(maximum=INTEGERS), ['{"maximum":3}'], []),
    ({"const": {"exclusiveMaximum": 1}}, ['{"exclusiveMaximum":1}'], ['{"maximum":1}']),
]


@pytest.mark.parametrize(("schema", "good", "bad"), BOUNDS)
def test_a_number_is_within_its_bounds(schema: Any, good: list[str], bad: list[str]) -> None:
    assert [reply for reply in good if not fits(schema, reply)] == []
    assert [reply for reply in bad if fits(schema, reply)] == []


def test_no_blank_of_a_json_reply_is_endless() -> None:
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, grammar.of_schema({"type": "object"}), limits=grammar.LIMITS, log_level=0)
    assert matcher.try_consume_tokens(list(b"{\n" + b" " * 50)) < 30
