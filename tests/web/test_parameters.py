"""What a job may say of its sampling and of the reply's form: taken and echoed, or refused with what would be right."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio

from llamalith_app.app import Timings
from llamalith_app.contracts.parameters import NAMES
from llamalith_app.settings.config import Config
from tests.web.conftest import PATIENT, module_api, module_config, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")
config, api = module_config, module_api


def n_jobs(config: Config) -> int:
    connection = sqlite3.connect(config.database_path)
    (found,) = connection.execute("SELECT count(*) FROM jobs").fetchone()
    connection.close()
    return int(found)


def form(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **more}}


SMALL = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
ALL = {
    "max_tokens": 7,
    "temperature": 0.0,
    "top_p": 0.5,
    "top_k": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repeat_penalty": 1.5,
    "presence_penalty": -2.0,
    "frequency_penalty": 2.0,
    "seed": 0,
    "stop": ["a", "b"],
    "response_format": form(SMALL, strict=True),
    "truncation": "disabled",
    "raw": True,
    "reasoning_effort": "low",
    "chat_template_kwargs": {"enable_thinking": False, "style": "brief", "n": 3, "share": 0.5, "nothing": None},
}


@pytest.mark.parametrize("path", ["/api/jobs", "/api/conversations/c/reply"])
async def test_the_parameters_of_a_job_are_stored_and_returned(api: httpx.AsyncClient, path: str) -> None:
    assert set(ALL) == set(NAMES)
    answer = await api.post(path, json={"content": "x", **ALL})
    assert answer.status_code == 200, answer.text
    job = (await api.get(f"/api/jobs/{answer.json()['job_id']}")).json()
    assert job["parameters"] == ALL
    (listed, *_) = (await api.get("/api/jobs?limit=1")).json()["jobs"]
    assert listed["parameters"] == ALL


TAKEN: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
    ({}, None),
    ({"max_tokens": None, "stop": None, "response_format": None}, None),
    ({"max_tokens": 1_048_576}, {"max_tokens": 1_048_576}),
    ({"stop": "END"}, {"stop": "END"}),
    ({"stop": []}, {"stop": []}),
    ({"temperature": 1}, {"temperature": 1.0}),
    *(({"reasoning_effort": effort}, {"reasoning_effort": effort}) for effort in ("none", "high", 0, 1_048_576)),
    ({"chat_template_kwargs": {}}, {"chat_template_kwargs": {}}),
    ({"seed": 2**32 - 1}, {"seed": 2**32 - 1}),
    ({"response_format": {"type": "text"}}, {"response_format": {"type": "text"}}),
    ({"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_object"}}),
    ({"response_format": {"type": "text"}, "grammar_name": "yes_or_no"}, {"response_format": {"type": "text"}}),
    *(
        ({"response_format": wanted}, {"response_format": wanted})
        for wanted in (
            {"type": "json_object", "schema": SMALL},
            {"type": "json_object", "schema": {}},
            {"type": "json_schema", "name": "d", "schema": SMALL, "strict": True, "description": "of a dragon"},
            {"type": "json_schema", "schema": SMALL},
            {"type": "json_schema", "json_schema": {"schema": SMALL}},
            {"type": "json_schema", "json_schema": {"name": "my.schema v2 (é)", "schema": SMALL}},
        )
    ),
]


@pytest.mark.parametrize(("sent", "expected"), TAKEN, ids=[json.dumps(sent)[:40] for sent, _ in TAKEN])
async def test_only_parameters_that_were_sent_are_returned(
    api: httpx.AsyncClient, sent: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    answer = await api.post("/api/jobs", json={"content": "x", **sent})
    assert answer.status_code == 200, answer.text
    assert (await api.get(f"/api/jobs/{answer.json()['job_id']}")).json()["parameters"] == expected


WRONG = [
    *(
        ("max_tokens", value, "a whole number ≥ 1 and ≤ 1048576")
        for value in ("0", "-1", "1048577", "1.5", '"x"', "true", "1e30")
    ),
    *(("temperature", value, "a number ≥ 0 and ≤ 5") for value in ("-0.1", "5.1", '"hot"', "[]")),
    *(("top_p", value, "a number > 0 and ≤ 1") for value in ("0", "1.01", "-1")),
    *(("top_k", value, "a whole number ≥ 0 and ≤ 1000000") for value in ("-1", "1000001", "0.5")),
    *(("min_p", value, "a number ≥ 0 and ≤ 1") for value in ("-0.01", "2")),
    *(("typical_p", value, "a number > 0 and ≤ 1") for value in ("0", "2")),
    *(("repeat_penalty", value, "a number > 0 and ≤ 5") for value in ("0", "6")),
    *(("presence_penalty", value, "a number ≥ -2 and ≤ 2") for value in ("-3", "2.5")),
    *(("frequency_penalty", value, "a number ≥ -2 and ≤ 2") for value in ("-3", "2.5")),
    *(("seed", value, "a whole number ≥ 0 and ≤ 4294967295") for value in ("-1", "4294967296", '"x"')),
    *(
        ("stop", value, "text of 1 to 64 characters, or a list of at most 16 such texts")
        for value in ('""', '[""]', json.dumps("x" * 10_000), json.dumps(["x" * 65]), json.dumps(["x"] * 17), "5", "{}")
    ),
    *(
        ("reasoning_effort", value, "one of none, low, medium, high, or a whole number of tokens ≥ 0 and ≤ 1048576")
        for value in ('"most"', '""', "-1", "1048577", "1.5", "true", "[]")
    ),
    *(
        (
            "chat_template_kwargs",
            value,
            "an object of at most 16 numbers, booleans and texts of at most 1000 characters, under names of letters,"
            " digits and _ that the template does not get anyway, as it gets messages",
        )
        for value in (
            "5",
            '"x"',
            '{"a b": 1}',
            '{"messages": 1}',
            '{"bos_token": ""}',
            '{"a": {}}',
            '{"a": []}',
            '{"a": 1000000000000000000000000000000}',
            json.dumps({"a": "x" * 1001}),
            json.dumps({f"a{n}": 1 for n in range(17)}),
        )
    ),
    *(("temperature", value, "not valid JSON") for value in ("NaN", "Infinity", "-Infinity")),
    *(("temperature", value, "a number ≥ 0 and ≤ 5") for value in ('"NaN"', '"nan"', '"Infinity"', '"inf"')),
    *(("top_p", value, "a number > 0 and ≤ 1") for value in ('"NaN"', '"-inf"')),
    ("temperature", "1e999", ""),
]


@pytest.mark.parametrize(("name", "value", "expected"), WRONG, ids=[f"{name}={value[:20]}" for name, value, _ in WRONG])
async def test_what_is_out_of_range_is_refused_with_the_range(
    api: httpx.AsyncClient, config: Config, name: str, value: str, expected: str
) -> None:
    before = n_jobs(config)
    body = f'{{"content": "x", "{name}": {value}}}'
    answer = await api.post("/api/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert expected in answer.json()["detail"]
    if expected != "not valid JSON" and expected:
        assert re.fullmatch(rf"{name}(\[(\d|\.\.\.)\])?: expected {re.escape(expected)}", answer.json()["detail"])
    assert n_jobs(config) == before


FORMS: dict[str, tuple[Any, str]] = {
    "no type": ({}, "response_format.type: missing; expected one of"),
    "an unknown type": ({"type": "xml"}, "response_format.type: expected one of text, json_object, json_schema"),
    "text for it": ("json_object", "response_format: expected an object or null, got a string"),
    "no schema": ({"type": "json_schema"}, "expected the schema in json_schema.schema, or in schema"),
    "a name alone": (
        {"type": "json_schema", "json_schema": {"name": "n"}},
        "response_format.json_schema.schema: missing",
    ),
    "two schemas": (form({}) | {"schema": {}}, "and not in both"),
    "a name of 257 characters": (
        {"type": "json_schema", "json_schema": {"name": "n" * 257, "schema": {}}},
        "response_format.json_schema.name: expected at most 256 characters",
    ),
    "a schema for another type": (
        {"type": "json_object", "json_schema": {"schema": {}}},
        "json_",
    ),
    "a schema for free text": ({"type": "text", "schema": {}}, "schema"),
    "a field that nobody knows": (form({}, schema_definition={}), "schema_definition"),
    "a bad reference beside a type": (
        {"type": "json_object", "schema": {"$ref": "#/$defs/x"}},
        "response_format.schema: at #/$ref: leads to nothing",
    ),
    "a list for a schema": (form([]), "response_format.json_schema.schema: expected an object, got a list"),
    "a cycle": (form({"$ref": "#"}), "goes round in a circle"),
    "a bad reference": (form({"$ref": "#/$defs/x"}), "at #/$ref: leads to nothing"),
    "a contradiction": (
        form(
            {
                "type": "object",
                "properties": {"a": {"type": "string", "minLength": 3, "maxLength": 1}},
                "required": ["a"],
            }
        ),
        "at #/properties/a: Unsatisfiable schema: minLength (3) is greater than maxLength (1)",
    ),
    "an unsupported keyword": (
        form({"type": "object", "properties": {"a": {"uniqueItems": True}}}, strict=True),
        "at #/properties/a/uniqueItems: not supported: uniqueItems; without strict it is taken",
    ),
    "the same beside a type": (
        {"type": "json_schema", "schema": {"not": {"type": "null"}}, "strict": True},
        "response_format.schema: at #/not: not supported: not; without strict it is taken",
    ),
    "a broken pattern, not strict": (form({"type": "string", "pattern": "("}), "at #/pattern: regex parse error"),
    "1 MB": (form({"enum": ["x" * 1_000_000]}), "a schema has at most 65536"),
    "deep nesting": (form(json.loads('{"items":' * 200 + "{}" + "}" * 200)), "nested more than 100 deep"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "expected"), FORMS.values(), ids=FORMS.keys())
async def test_a_form_that_no_reply_can_have_is_refused_with_the_part_that_is_why(
    api: httpx.AsyncClient, config: Config, sent: Any, expected: str
) -> None:
    before = n_jobs(config)
    answer = await api.post("/api/jobs", json={"content": "x", "response_format": sent})
    assert answer.status_code == 400, answer.text
    assert answer.json()["detail"].startswith("response_format")
    assert expected in answer.json()["detail"]
    assert len(answer.json()["detail"]) < 500
    assert n_jobs(config) == before


@pytest.mark.parametrize("strict", [{}, {"strict": None}, {"strict": False}])
async def test_a_job_names_what_its_reply_cannot_be_held_to(api: httpx.AsyncClient, strict: dict[str, Any]) -> None:
    sets = {"properties": {"tags": {"type": "array", "uniqueItems": True}}, "required": ["tags"], "type": "object"}
    answer = await api.post("/api/jobs", json={"content": "x", "response_format": form(sets, **strict)})
    assert answer.status_code == 200, answer.text
    job = (await api.get(f"/api/jobs/{answer.json()['job_id']}")).json()
    assert job["unenforced"] == ["#/properties/tags/uniqueItems"]
    assert (job["reply_valid"], job["reply_problem"]) == (None, None)
    answer = await api.post("/api/jobs", json={"content": "x", "response_format": form(SMALL, **strict)})
    assert (await api.get(f"/api/jobs/{answer.json()['job_id']}")).json()["unenforced"] == []


async def test_a_job_that_is_tried_again_is_held_to_the_same(api: httpx.AsyncClient) -> None:
    sent = {"content": "x", "response_format": form({"type": "array", "uniqueItems": True})}
    first = (await api.post("/api/jobs", json=sent)).json()["job_id"]
    await api.post(f"/api/jobs/{first}/cancel")
    again = (await api.post(f"/api/jobs/{first}/retry")).json()["job_id"]
    assert (await api.get(f"/api/jobs/{again}")).json()["unenforced"] == ["#/uniqueItems"]


async def test_a_job_of_an_earlier_release_is_read(api: httpx.AsyncClient, config: Config) -> None:
    """What was stored before names could be absent, and schemas could have gaps."""
    job_id = (await api.post("/api/jobs", json={"content": "x"})).json()["job_id"]
    old = {"seed": 1, "response_format": form(SMALL, strict=True)}
    connection = sqlite3.connect(config.database_path)
    connection.execute("UPDATE jobs SET parameters = ?, unenforced = NULL WHERE id = ?", (json.dumps(old), job_id))
    connection.commit()
    connection.close()
    job = (await api.get(f"/api/jobs/{job_id}")).json()
    assert (job["parameters"], job["unenforced"]) == (old, [])


async def test_a_reply_is_held_to_one_thing(api: httpx.AsyncClient) -> None:
    sent = {"content": "x", "grammar_name": "yes_or_no", "response_format": {"type": "json_object"}}
    answer = await api.post("/api/jobs", json=sent)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("response_format: ")
    assert "grammar_name" in answer.json()["detail"]


@pytest.mark.slow
async def test_an_exponential_schema_is_refused_by_the_processor_time_that_it_takes(
    api: httpx.AsyncClient, config: Config
) -> None:
    before = n_jobs(config)
    evil = form({"allOf": [{"type": "string", "pattern": f"(a|b)*{i}(a|b){{{i}}}"} for i in range(30)]})
    answer = await api.post("/api/jobs", json={"content": "x", "response_format": evil}, timeout=60)
    assert answer.status_code == 400
    assert "to compile" in answer.json()["detail"]
    assert n_jobs(config) == before


async def test_a_schema_whose_turn_does_not_come_is_one_to_send_again(api: httpx.AsyncClient, config: Config) -> None:
    before = n_jobs(config)
    sent = {"content": "x", "response_format": form({"const": "not in time"})}
    async with serving(config, msgspec.structs.replace(PATIENT, schema_s=0)) as impatient:
        answer = await impatient.post("/api/jobs", json=sent)
    assert answer.status_code == 503
    assert answer.json()["type"] == "about:llamalith/schema-judge-busy"
    assert answer.headers["retry-after"] == "5"
    assert n_jobs(config) == before
    assert (await api.post("/api/jobs", json=sent)).status_code == 200


@pytest_asyncio.fixture(loop_scope="module")
async def in_time(config: Config) -> AsyncIterator[httpx.AsyncClient]:
    """An application that waits for a validation as long as the product does."""
    async with serving(config, msgspec.structs.replace(PATIENT, schema_s=Timings().schema_s)) as client:
        yield client


@pytest.mark.slow
async def test_evil_schemas_end_in_time_and_hold_up_nobody(in_time: httpx.AsyncClient) -> None:
    api = in_time

    def evil(number: int) -> dict[str, Any]:
        return form({"patternProperties": {f"^(a|b)*{i}{number}$": {"type": "string"} for i in range(600)}})

    started = time.monotonic()
    asked = [
        asyncio.create_task(api.post("/api/jobs", json={"content": "x", "response_format": evil(number)}))
        for number in range(6)
    ]
    n_answered = 0
    while not any(task.done() for task in asked):
        assert (await api.get("/healthz")).status_code == 200
        n_answered += 1
    answers = await asyncio.gather(*asked)
    # Validated to the end of its time, or asked to come back because others were before it.
    assert {answer.status_code for answer in answers} <= {400, 503}
    assert time.monotonic() - started < 20
    assert n_answered > 3


async def test_a_schema_is_validated_once(api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = {"content": "x", "response_format": form({"const": "validated once"})}
    assert (await api.post("/api/jobs", json=sent)).status_code == 200
    monkeypatch.setattr("llamalith_app.supervise.program.run", None)
    assert (await api.post("/api/jobs", json=sent)).status_code == 200


async def test_a_validation_that_fails_says_nothing_of_the_schema(
    api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = {"content": "x", "response_format": form({"const": "validated again"})}
    with monkeypatch.context() as patched:
        patched.setattr("llamalith_app.supervise.program.sys", SimpleNamespace(executable="/bin/false"))
        assert (await api.post("/api/jobs", json=sent)).status_code == 503
    assert (await api.post("/api/jobs", json=sent)).status_code == 200


async def test_the_openapi_document_has_the_ranges(api: httpx.AsyncClient) -> None:
    schemas = (await api.get("/api/openapi.json")).json()["components"]["schemas"]
    for shape in ("JobCreate", "ReplyCreate", "Parameters"):
        assert set(NAMES) <= set(schemas[shape]["properties"]), shape
    for name, least, most in (
        ("max_tokens", {"minimum": 1}, 1_048_576),
        ("temperature", {"minimum": 0}, 5),
        ("top_p", {"exclusiveMinimum": 0}, 1),
        ("top_k", {"minimum": 0}, 1_000_000),
        ("repeat_penalty", {"exclusiveMinimum": 0}, 5),
        ("presence_penalty", {"minimum": -2}, 2),
        ("seed", {"minimum": 0}, 2**32 - 1),
        ("timeout_s", {"exclusiveMinimum": 0}, 604_800),
    ):
        expected = schemas["JobCreate"]["properties"][name]
        (number,) = [one for one in expected["anyOf"] if one["type"] != "null"]
        limits = {key: value for key, value in number.items() if "inimum" in key or "aximum" in key}
        assert limits == {**least, "maximum": most}, name
    assert "parameters" in schemas["Job"]["properties"]
