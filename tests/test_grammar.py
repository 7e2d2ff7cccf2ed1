"""GBNF as llguidance takes it, the folder of grammars, and what JSON Schemas hold replies to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from llamalith_app.errors import ConfigError
from llamalith_app.grammars import gbnf, grammar, keywords, schema, validation


def takes(text: str, reply: str) -> bool:
    """Whether a grammar allows exactly this reply."""
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, grammar.from_gbnf(text), limits=grammar.LIMITS, log_level=0)
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


@pytest.mark.parametrize(("text", "reason"), WRONG.items(), ids=[text[:30] for text in WRONG])
def test_an_invalid_grammar_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(gbnf.GbnfError) as error:
        gbnf.to_lark(text)
    assert reason in str(error.value)


BROKEN = {
    "no grammar": "expected NAME ::=",
    'root ::= root "a"': "allows no reply",
    'root ::= ((("a"{2000}){2000}){2000}){2000} ' + "a " * 5000: "no rule named a",
    "#" + "x" * grammar.MAX_GRAMMAR_BYTES: "More than 100000 bytes, which is the limit",
    "root ::= " + '"a"' + "*" * 5000: "deep",
    "root ::= " + " | ".join(f"[{chr(code)}-{chr(code * 2)}] [^{chr(code)}]" for code in range(200, 3500)): "too big",
}


@pytest.mark.parametrize(("text", "reason"), BROKEN.items(), ids=[text[:30] for text in BROKEN])
def test_a_broken_file_of_the_folder_is_named_at_the_start(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "good.gbnf").write_text('root ::= "a"')
    (tmp_path / "bad.gbnf").write_text(text)
    with pytest.raises(ConfigError) as error:
        grammar.load(tmp_path)
    (problem,) = error.value.problems
    assert problem.startswith(f"{tmp_path / 'bad.gbnf'}: ")
    assert reason in problem
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
    "keywords that are annotations": {"title": "t", "description": "d", "default": 1, "examples": [2], "x-mine": 3},
    "what OpenAPI adds": person(a={"type": "string", "nullable": True, "example": "e", "xml": {}, "readOnly": True}),
    "names that nothing refers to": person(a={"$id": "a", "$anchor": "b", "$dynamicAnchor": "c", "type": "string"}),
    "a schema of another kind": {"$schema": "https://example.com/mine", "$id": "https://example.com/x", "type": "null"},
    "draft 7 by https": {"$schema": "https://json-schema.org/draft-07/schema#", "type": "null"},
    "a keyword of a later draft": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "dependentRequired": {"a": ["b"]},
    },
    "zod's record": person(a={"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {}}),
    "zod's never": {"type": "object", "properties": {"a": {"not": {}}}},
    "keywords that allow everything": {"uniqueItems": False, "unevaluatedProperties": True, "if": {}, "then": {}},
    "a tagged union of references": {
        "$defs": {name: person(kind={"const": name, "type": "string"}) for name in ("cat", "dog")},
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
        "discriminator": {"propertyName": "kind", "mapping": {"cat": "#/$defs/cat", "dog": "#/$defs/dog"}},
    },
    **{
        f"the format {name}": person(a={"type": "string", "format": name})
        for name in ("uri-reference", "regex", "password", "byte", "phone", "url", "includes", "starts_with", "unknown")
    },
    "48 objects in one another": json.loads('{"type":"object","properties":{"a":' * 48 + "true" + "}}" * 48),
}


@pytest.mark.parametrize("good", GOOD.values(), ids=GOOD.keys())
def test_a_schema_that_replies_can_be_held_to_is_taken(good: Any) -> None:
    assert list(schema.validate(good)) == [schema.Verdict(reason=None)]


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
    "a contradiction beside one that does no harm": (
        person(a={"type": "object", "properties": {"b": {"enum": []}, "c": {"enum": []}}, "required": ["c"]}),
        "#/properties/a/properties/c",
        "anyOf is empty",
    ),
    "what nothing fits": (person(a=False) | {"additionalProperties": False}, "#", "property 'a' is unsatisfiable"),
    "a keyword's value": (
        person(a=person(b={"type": "string", "minLength": "1"}) | {"additionalProperties": False}),
        "#/properties/a/properties/b",
        "minLength",
    ),
    "a broken pattern": (person(a={"type": "string", "pattern": "("}), "#/properties/a/pattern", "unclosed group"),
    "no schema": (person(a=5), "#/properties/a", "is no schema"),
    "an id": (person(a={"$id": "x", "items": {"$ref": "#"}}), "#/properties/a/$id", "not supported"),
    "llguidance's own word": ({"x-guidance": {"lenient": True}, "not": {}}, "#/x-guidance", "not supported"),
    "a name with a control character": (
        person(a={"type": "object", "properties": {"a\x01": {}}, "required": ["a\x01"]}),
        "#/properties/a/properties",
        "control character",
    ),
    "a control character": (person(a={"enum": [1, {"b": "\x07"}]}), "#/properties/a/enum/1/b", "control character"),
    "a number like another one": (
        person(a={"enum": [1, 2**53 + 1]}),
        "#/properties/a/enum/1",
        "distinguished from its neigh",
    ),
    "depth": (json.loads('{"items":' * 200 + "{}" + "}" * 200), "#", "nested more than 100 deep"),
}


@pytest.mark.parametrize(("bad", "at", "reason"), FLAWS.values(), ids=FLAWS.keys())
def test_a_schema_that_cannot_be_honoured_is_refused_with_the_part_that_is_why(bad: Any, at: str, reason: str) -> None:
    *_, verdict = schema.validate(bad)
    assert verdict.reason is not None
    assert reason in verdict.reason
    assert verdict.at.startswith(at)
    if reason != "circle":
        assert verdict.at == at


LOOK = {"type": "string", "pattern": r"\bfoo\b"}
CLOSED = {"additionalProperties": False}
GAPS: dict[str, tuple[Any, set[str], str]] = {
    "a set": (
        person(a={"type": "array", "uniqueItems": True}),
        {"#/properties/a/uniqueItems"},
        "not supported: unique",
    ),
    "one deep within others": (
        person(a=person(b=person(c={"uniqueItems": True}) | CLOSED) | CLOSED) | CLOSED,
        {"#/properties/a/properties/b/properties/c/uniqueItems"},
        "not supported: uniqueItems",
    ),
    "behind a reference": (
        {"$defs": {"a/b": {"not": {"type": "null"}}}, "type": "array", "items": {"$ref": "#/$defs/a~1b"}},
        {"#/$defs/a~1b/not"},
        "not supported: not",
    ),
    "a condition": (
        {"if": {"minLength": 2}, "then": {"maxLength": 3}, "else": {"const": ""}},
        {"#/if", "#/then", "#/else"},
        "not supported",
    ),
    "look-around": (person(a=LOOK) | CLOSED, {"#/properties/a/pattern"}, "lookarounds not supported"),
    "look-ahead in names": (
        {"type": "object", "patternProperties": {"^(?=a)": {}}, "additionalProperties": False},
        {"#/patternProperties", "#/additionalProperties"},
        "look-around",
    ),
    "names that match two patterns": (
        {"type": "object", "patternProperties": {"a": {}, "b": {}}},
        {"#/patternProperties"},
        "not disjoint",
    ),
    "one of two that may both fit": ({"oneOf": [{"type": "string"}, {"minLength": 2}]}, {"#/oneOf"}, "anyOf is"),
    "the inner one of two": (
        {"oneOf": [{"type": "null"}, {"type": "array", "items": {"oneOf": [{"type": "string"}, {}]}}]},
        {"#/oneOf/1/items/oneOf"},
        "anyOf is",
    ),
    "names that one name could stand for": (
        person(a={"type": "object", "required": ["b", "c"], "minProperties": 4}),
        {"#/properties/a/minProperties"},
        "expected at most 3",
    ),
    "one of very many names": (
        {"type": "object", "properties": {f"p{n}": {} for n in range(200)}, "minProperties": 1} | CLOSED,
        {"#/minProperties"},
        "expected at most 50",
    ),
    "counts of what may be absent": (
        {"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1, "maxProperties": 3},
        {"#/minProperties", "#/maxProperties"},
        "min/maxProperties only supported",
    ),
    "the bounds of a small float": (
        {"type": "number", "minimum": -3.4028234663852886e38, "maximum": 3.4028234663852886e38},
        {"#/minimum", "#/maximum"},
        "float range",
    ),
}


@pytest.mark.parametrize(("loose", "at", "reason"), GAPS.values(), ids=GAPS.keys())
def test_what_no_reply_can_be_held_to_is_named_and_the_rest_is_held_to(loose: Any, at: set[str], reason: str) -> None:
    *_, verdict = schema.validate(loose)
    assert verdict.reason is None
    assert {gap.at for gap in verdict.gaps} == at
    assert all(reason in gap.reason for gap in verdict.gaps)
    assert grammar.problem(grammar.from_schema(loose, at)) == ""


UNREAD = {"type": "string", "pattern": r"^[\w-\.]+$"}
"""llguidance has a meaning for the hyphen; jsonschema_rs takes it for the broken start of a range."""
SET = {"type": "array", "uniqueItems": True}


def test_a_pattern_that_is_enforced_need_not_be_read_by_the_validation() -> None:
    loose = SET | {"items": UNREAD}
    *_, verdict = schema.validate(loose)
    assert verdict.reason is None
    assert {gap.at for gap in verdict.gaps} == {"#/uniqueItems"}
    assert not fits(loose | {"uniqueItems": False}, '["a b"]')
    assert validation.problem(loose, '["a-b"]') == ""
    assert validation.problem(loose, '["a","a"]')


@pytest.mark.parametrize(
    ("loose", "at"),
    [
        (SET | {"contains": UNREAD}, "#/contains/pattern"),
        (SET | {"items": UNREAD, "contains": {"pattern": "["}}, "#/contains/pattern"),
        ({"type": "string", "not": {"$ref": "#/$defs/a"}, "$defs": {"a": UNREAD}}, "#/$defs/a/pattern"),
    ],
)
def test_a_pattern_that_is_not_enforced_has_to_be_read_by_the_validation(loose: Any, at: str) -> None:
    *_, verdict = schema.validate(loose)
    assert verdict.reason
    assert verdict.at == at


def test_what_is_not_enforced_is_left_out_and_all_else_stays() -> None:
    loose = person(a=LOOK | {"maxLength": 3}, b={"oneOf": [{"type": "string"}, {"type": "string"}]})
    (held,) = (grammar.from_schema(loose, ["#/properties/a/pattern", "#/properties/b/oneOf"]),)
    tokenizer = LLTokenizer("byte")
    for reply, is_right in (('{"a":"xyz","b":""}', True), ('{"a":"wxyz","b":""}', False), ('{"a":"x","b":1}', False)):
        matcher = LLMatcher(tokenizer, held, limits=grammar.LIMITS, log_level=0)
        tokens = list(reply.encode())
        assert (matcher.try_consume_tokens(tokens) == len(tokens)) is is_right, reply


def shuffled(value: Any, random: Random) -> Any:
    if isinstance(value, list):
        return [shuffled(inner, random) for inner in value]
    if not isinstance(value, dict):
        return value
    return {key: shuffled(value[key], random) for key in random.sample(list(value), len(value))}


ONE_FAULT = {name: bad for name, (bad, _, reason) in FLAWS.items() if reason != "circle"} | {
    name: loose for name, (loose, _, _) in GAPS.items()
}


@pytest.mark.slow
@pytest.mark.parametrize("at_fault", ONE_FAULT.values(), ids=ONE_FAULT.keys())
def test_in_whatever_order_its_keys_stand_the_same_part_of_a_schema_is_blamed(at_fault: Any) -> None:
    def blamed(order: Any) -> Any:
        *_, verdict = schema.validate(order)
        return verdict.at, (verdict.reason or "").partition("(")[0], {gap.at for gap in verdict.gaps}

    expected = blamed(at_fault)
    assert [blamed(shuffled(at_fault, Random(seed))) for seed in range(4)] == [expected] * 4


def raw_problem(bare: Any) -> str:
    """What the library itself says of a schema."""
    try:
        return grammar.problem(LLMatcher.grammar_from_json_schema(json.dumps(bare)))
    except ValueError as error:
        return str(error)


# Those of JSON Schema's drafts and OpenAPI's registry, and what zod and pydantic write.
OTHER_FORMATS = """
    base64 base64url binary byte char cidrv4 cidrv6 color commonmark cuid cuid2 date-time-local decimal double
    e164 emoji ends_with file-path float host-name html http-date idn-email idn-hostname includes int16 int32 int64 int8
    ip-address ipvanyaddress iri iri-reference json-pointer json-string jwt ksuid lowercase media-range nanoid
    password path phone regex relative-json-pointer sf-string starts_with style time-local ulid uppercase uri-reference
    uri-template url utc-millisec uuid4 xid
""".split()  # noqa: SIM905


def test_the_formats_that_are_enforced_are_those_that_the_library_knows() -> None:
    assert [name for name in keywords.FORMATS if raw_problem({"type": "string", "format": name})] == []
    assert [name for name in keywords.FORMATS if fits({"type": "string", "format": name}, '"no such thing: "')] == []
    assert [name for name in OTHER_FORMATS if not raw_problem({"type": "string", "format": name})] == []


def test_the_docs_name_the_formats_that_are_enforced() -> None:
    page = Path(__file__).parent.parent.joinpath("docs", "api.md").read_text()
    assert ", ".join(f"`{name}`" for name in keywords.FORMATS) in " ".join(page.split())


@pytest.mark.parametrize(("keyword", "since"), keywords.UNENFORCED.items(), ids=keywords.UNENFORCED.keys())
def test_the_keywords_that_are_not_enforced_are_those_that_the_library_refuses(keyword: str, since: int) -> None:
    for uri, draft in keywords.DRAFTS.items():
        refused = raw_problem({"$schema": uri, keyword: {}}).startswith("not supported")
        assert refused == (draft >= since), uri


def wide(n_names: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(n_names)}}


WIDE: dict[str, tuple[Callable[[int], Any], str]] = {
    "at the root": (wide, "#"),
    "in what must be there": (lambda n: person(a=wide(n)), "#/properties/a"),
    "in what may be absent": (lambda n: {"type": "object", "properties": {"a": wide(n)}}, "#/properties/a"),
    "in a list": (lambda n: {"type": "array", "items": wide(n)}, "#/items"),
    "behind a reference": (lambda n: {"$defs": {"w": wide(n)}, "anyOf": [{"$ref": "#/$defs/w"}, {}]}, "#/$defs/w"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("made", "at"), WIDE.values(), ids=WIDE.keys())
def test_a_schema_of_which_too_much_may_come_next_is_refused_with_the_part_that_is_why(
    made: Callable[[int], Any], at: str
) -> None:
    *_, verdict = schema.validate(made(1300))
    assert verdict.at == at
    assert "too many choices at one place" in (verdict.reason or "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "made",
    [made if name == "at the root" else pytest.param(made, marks=pytest.mark.slow) for name, (made, _) in WIDE.items()],
    ids=WIDE.keys(),
)
def test_a_thousand_choices_at_one_place_are_not_too_many(made: Callable[[int], Any]) -> None:
    *_, verdict = schema.validate(made(1000))
    assert verdict == schema.Verdict(reason=None)


def optional(n_schemas: int, n_names: int) -> list[dict[str, Any]]:
    return [
        {"type": "object", "properties": {f"p{number}_{name}": {} for name in range(n_names)}}
        for number in range(n_schemas)
    ]


LATE = {f"a{number}": {"type": "string"} for number in range(6)}
WIDE_BY_MEMBERS: dict[str, Any] = {
    "references of which all are to fit": person(**LATE, b={"allOf": [{"$ref": f"#/$defs/d{n}"} for n in range(3)]})
    | {"$defs": {f"d{number}": part for number, part in enumerate(optional(3, 450))}},
    "schemas of which all are to fit": person(**LATE, b={"allOf": optional(8, 240)}),
    "many small schemas": person(**LATE, b={"anyOf": optional(19, 70)}),
    "fewer larger schemas": person(**LATE, b={"anyOf": optional(15, 90)}),
}


@pytest.mark.parametrize(
    "late",
    [
        late if name == "fewer larger schemas" else pytest.param(late, marks=pytest.mark.slow)
        for name, late in WIDE_BY_MEMBERS.items()
    ],
    ids=WIDE_BY_MEMBERS.keys(),
)
def test_what_the_members_of_a_part_open_together_counts(late: Any) -> None:
    *_, verdict = schema.validate(late)
    assert verdict.at == "#/properties/b"
    assert "too many choices at one place" in (verdict.reason or "")


def test_references_in_a_circle_are_counted_once() -> None:
    *_, verdict = schema.validate({"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}})
    assert verdict == schema.Verdict(reason=None)


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


# Each takes about as much of the processor as it may.
@pytest.mark.slow
@pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL.keys())
def test_the_validation_of_an_evil_schema_ends_by_itself(evil: Any) -> None:
    program = subprocess.run(
        [sys.executable, "-m", "llamalith_app.grammars.schema"],
        input=json.dumps(evil).encode(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert program.returncode != 0 or b'"reason":null' not in program.stdout


def fits(schema: Any, reply: str) -> bool:
    matcher = LLMatcher(LLTokenizer("byte"), grammar.from_schema(schema), limits=grammar.LIMITS, log_level=0)
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
def test_no_key_evades_its_subschema_by_being_written_with_escapes(
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
    matcher = LLMatcher(tokenizer, grammar.from_schema({"type": "object"}), limits=grammar.LIMITS, log_level=0)
    assert matcher.try_consume_tokens(list(b"{\n" + b" " * 50)) < 30
