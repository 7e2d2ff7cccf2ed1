"""Requests as real clients send them: ids of chat platforms, nulls of form builders, unusual characters in paths, and
unusual content types."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest
from sqlalchemy import Connection, event

from llamalith_app.contracts.jobs import JobBrief, JobCreate, LegacySubmit, ReplyCreate
from llamalith_app.settings.config import Config
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import reads
from tests.needs import need_file
from tests.nginx import nginx
from tests.streams.sse import reading
from tests.web.conftest import log_in, module_api, module_config, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")
config, api = module_config, module_api

BODIES: dict[str, type[msgspec.Struct]] = {
    "/api/jobs": JobCreate,
    "/api/conversations/c/reply": ReplyCreate,
    "/api/submit": LegacySubmit,
}
NEEDED = {"/api/jobs": "content", "/api/conversations/c/reply": "content", "/api/submit": "user_input"}
PYTHON = re.compile(r"`|\b(str|int|float|bool|dict|list\[|tuple|None|NoneType|regex|Expected|Object|Invalid)\b")


def fields() -> Iterator[tuple[str, msgspec.structs.FieldInfo]]:
    return ((path, field) for path, body in BODIES.items() for field in msgspec.structs.fields(body))


JSON = "application/json"


async def post(
    api: httpx.AsyncClient, path: str, content: bytes, headers: dict[str, str] | None = None
) -> httpx.Response:
    return await api.post(path, content=content, headers={"Content-Type": JSON} | (headers or {}))


# Null and numbers


OPTIONAL = [(path, field.name) for path, field in fields() if not field.required]


@pytest.mark.parametrize(("path", "name"), OPTIONAL)
async def test_null_means_absent(api: httpx.AsyncClient, path: str, name: str) -> None:
    # A system prompt alone is a body too: nothing is left out that the body needs.
    sent = {NEEDED[path]: "x", "system_prompt": "y"} | {name: None}
    answer = await api.post(path, json=sent)
    assert answer.status_code == 200, answer.text


def shapes_within(wanted: Any) -> Iterator[msgspec.inspect.StructType]:
    if isinstance(wanted, msgspec.inspect.StructType):
        yield wanted
        for field in wanted.fields:
            yield from shapes_within(field.type)
    for inner in getattr(wanted, "types", ()):
        yield from shapes_within(inner)
    for name in ("type", "item_type", "value_type"):
        if (inner := getattr(wanted, name, None)) is not None:
            yield from shapes_within(inner)


async def test_every_optional_field_of_every_body_accepts_null() -> None:
    found = [shape for body in BODIES.values() for shape in shapes_within(msgspec.inspect.type_info(body))]
    assert {"JobCreate", "NamedSchema"} <= {shape.cls.__name__ for shape in found}
    for shape in found:
        for field in shape.fields:
            kinds = getattr(field.type, "types", (field.type,))
            takes_null = any(isinstance(kind, msgspec.inspect.NoneType | msgspec.inspect.AnyType) for kind in kinds)
            assert field.required or takes_null, (shape.cls.__name__, field.name)


@pytest.mark.parametrize(
    ("sent", "stored"), [(12345, "12345"), (-1001234567890, "-1001234567890"), (0, "0"), (7.0, "7")]
)
@pytest.mark.parametrize(("path", "name"), [("/api/jobs", "conversation_id"), ("/api/submit", "session_id")])
async def test_a_numeric_id_becomes_text(
    api: httpx.AsyncClient, path: str, name: str, sent: float, stored: str
) -> None:
    answer = await api.post(path, json={NEEDED[path]: "x", name: sent})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["conversation_id"], answer.json()["created_new"]) == (stored, False)


@pytest.mark.parametrize("sent", ["1.5", "true", "[1]", "{}", "9" * 30, "-" + "9" * 5000])
async def test_an_id_that_is_neither_text_nor_integer_is_refused_with_what_it_may_be(
    api: httpx.AsyncClient, sent: str
) -> None:
    answer = await post(api, "/api/jobs", b'{"content": "x", "conversation_id": %s}' % sent.encode())
    assert answer.status_code == 400
    if len(sent) < 1000:
        assert answer.json()["detail"] == (
            "conversation_id: expected 1 to 200 characters without control characters, or a whole number of at most"
            " 64 bits"
        )


# Ids in paths


IDS = ["a/b", "/", "//a//", "a%2Fb", "a%252F/b", "späß/ ?&=#🐉", "../..", "a/../b", "%", "/latest", "\\"]


@pytest.mark.parametrize("public_id", IDS)
@pytest.mark.parametrize("prefix", ["/api", "/chat/api"])
async def test_an_encoded_slash_is_part_of_the_id(api: httpx.AsyncClient, prefix: str, public_id: str) -> None:
    path = f"{prefix}/conversations/{quote(public_id, safe='')}"
    made = await api.post(f"{path}/reply", json={"content": "x"})
    assert made.status_code == 200, made.text
    assert made.json()["conversation_id"] == public_id
    job_id = made.json()["job_id"]
    latest = (await api.get(f"{path}/latest")).json()
    assert (latest["conversation_id"], latest["exists"], latest["last_job"]["id"]) == (public_id, True, job_id)
    messages = (await api.get(f"{path}/messages")).json()
    assert (messages["conversation_id"], messages["exists"]) == (public_id, True)
    assert messages["messages"][-1] == {"role": "user", "content": "x"}
    assert (await api.get(f"{prefix}/status/{quote(public_id, safe='')}")).json()["exists"]
    async with api.stream("GET", f"{path}/events") as events:
        assert events.status_code == 200
    assert (await api.post(f"{path}/cancel")).json()["cancelled"] == 1


async def test_a_plain_slash_still_separates_path_segments(api: httpx.AsyncClient) -> None:
    await api.post("/api/jobs", json={"content": "x", "conversation_id": "p/q"})
    answer = await api.get("/api/conversations/p/q/messages")
    assert answer.status_code == 404
    assert answer.json()["detail"] == "There is nothing at /api/conversations/p/q/messages."
    answer = await api.get("/api%2Fjobs")
    assert (answer.status_code, answer.json()["detail"]) == (404, "There is nothing at /api/jobs.")
    assert (await api.get("/api/jobs/1%2F2")).status_code == 400
    # The bytes of the mark itself are no text.
    assert not (await api.get("/api/conversations/p%ED%B0%AFq/latest")).json()["exists"]


async def test_the_page_of_an_id_with_a_slash_works_by_path_and_follows_its_stream(config: Config) -> None:
    async with serving(config) as client:
        await log_in(client)
        await client.post("/chat/jobs", data={"content": "slashed", "conversation_id": "s/t"})
        page = await client.get("/chat/conversations/s%2Ft")
        assert page.status_code == 200
        assert "slashed" in page.text
        (followed,) = re.findall(r'data-follow="([0-9]+)"', page.text)
        async with reading(client, f"/chat/stream?follow={followed}:") as reader:
            async for event in reader.events():
                if event.kind != "chats":
                    assert (event.kind, event.data) == ("to", 0)
                    break


async def test_nginx_passes_on_an_encoded_slash(api: httpx.AsyncClient, tmp_path: Path) -> None:
    await api.post("/api/jobs", json={"content": "x", "conversation_id": "n/x"})
    async with nginx(tmp_path, api.base_url.port or 0) as origin:
        answer = await api.get(f"{origin}/chat/api/conversations/n%2Fx/latest")
    assert (answer.status_code, answer.json()["exists"]) == (200, True)


async def test_nginx_answers_under_its_names_beside_debians_default_site(
    api: httpx.AsyncClient, tmp_path: Path
) -> None:
    default_site = need_file(Path("/etc/nginx/sites-available/default"), "nginx-common")
    async with nginx(tmp_path, api.base_url.port or 0, default_site=default_site.read_text()) as origin:
        for name in ("llamalith.example.org", "localhost", "127.0.0.1", socket.gethostname()):
            chat = await api.get(f"{origin}/chat/login", headers={"Host": name})
            assert (chat.status_code, "Llamalith" in chat.text) == (200, True), name
        others = await api.get(f"{origin}/chat/login", headers={"Host": "another.example.org"})
        assert (others.status_code, "nginx" in others.text) == (404, True)


@pytest.mark.parametrize("given", ["%20lead", "lead%20", "%20%20lead%20", "lead", "%C2%A0lead", "lead%E3%80%80"])
async def test_blanks_around_an_id_are_ignored(api: httpx.AsyncClient, given: str) -> None:
    await api.post("/api/jobs", json={"content": "x", "conversation_id": " lead "})
    for path in ("messages", "latest"):
        answered = (await api.get(f"/api/conversations/{given}/{path}")).json()
        assert (answered["conversation_id"], answered["exists"]) == ("lead", True)
    assert (await api.get(f"/api/status/{given}")).json()["exists"]
    assert (await api.get(f"/api/jobs?conversation_id={given}")).json()["jobs"]
    reply = await api.post(f"/api/conversations/{given}/reply", json={"content": "x"})
    assert reply.json()["conversation_id"] == "lead"
    async with api.stream("GET", f"/api/conversations/{given}/events") as events:
        assert events.status_code == 200
    cancelled = await api.post(f"/api/jobs/cancel?status=queued&conversation_id={given}")
    assert cancelled.json()["cancelled"] >= 2


@pytest.mark.parametrize("given", ["%20", "%C2%A0%20"])
@pytest.mark.parametrize("path", ["conversations/{}/messages", "conversations/{}/latest", "status/{}"])
async def test_an_id_of_blanks_is_no_id(api: httpx.AsyncClient, path: str, given: str) -> None:
    answer = await api.get("/api/" + path.format(given))
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("conversation_id: expected 1 to 200 characters that are not all blank")


@pytest.mark.parametrize("path", ["conversations/nobody/messages", "conversations/nobody/latest", "status/nobody"])
async def test_an_unknown_conversation_says_that_it_is_unknown(api: httpx.AsyncClient, path: str) -> None:
    answer = await api.get(f"/api/{path}")
    assert answer.status_code == 200
    assert (answer.json()["conversation_id"], answer.json()["exists"]) == ("nobody", False)


async def test_a_conversation_with_a_system_prompt_alone_exists(api: httpx.AsyncClient) -> None:
    await api.post("/api/jobs", json={"system_prompt": "s", "conversation_id": "system"})
    for path in ("conversations/system/messages", "conversations/system/latest", "status/system"):
        assert (await api.get(f"/api/{path}")).json()["exists"], path


# Bodies


BODY = '{"content": "größer", "conversation_id": "wrapped"}'


@pytest.mark.parametrize(
    ("sent", "headers"),
    [
        (codecs.BOM_UTF8 + BODY.encode(), {}),
        (BODY.encode(), {"Content-Type": "application/json; charset=utf-8"}),
        (BODY.encode(), {"Content-Type": 'application/json; charset="UTF-8"'}),
        (BODY.encode(), {"Content-Type": "application/json;charset=utf8; boundary=x"}),
        (BODY.encode(), {"Content-Encoding": "identity"}),
    ],
)
async def test_json_in_utf_8_is_accepted_with_any_valid_content_type(
    api: httpx.AsyncClient, sent: bytes, headers: dict[str, str]
) -> None:
    answer = await post(api, "/api/jobs", sent, headers)
    assert answer.status_code == 200, answer.text
    answered = (await api.get("/api/conversations/wrapped/messages")).json()
    assert answered["messages"][-1]["content"] == "größer"


@pytest.mark.parametrize(
    ("sent", "headers", "status", "detail"),
    [
        (
            gzip.compress(BODY.encode(), mtime=0),
            {"Content-Encoding": "gzip"},
            415,
            'as it is (identity), got "gzip"',
        ),
        (BODY.encode(), {"Content-Encoding": "br, gzip"}, 415, 'got "br, gzip"'),
        (BODY.encode("latin-1"), {"Content-Type": f"{JSON}; charset=ISO-8859-1"}, 415, 'utf-8, got "iso-8859-1"'),
        (BODY.encode("utf-16"), {"Content-Type": f"{JSON}; charset=utf-16"}, 415, 'charset=utf-8, got "utf-16"'),
        (BODY.encode("utf-16"), {}, 400, "The body is UTF-16 or UTF-32: expected UTF-8."),
        (BODY.encode("utf-16-be"), {}, 400, "The body is UTF-16 or UTF-32: expected UTF-8."),
        (BODY.encode("utf-32"), {}, 400, "The body is UTF-16 or UTF-32: expected UTF-8."),
        (BODY.encode("latin-1"), {}, 400, "The body is not valid UTF-8."),
        (codecs.BOM_UTF8 * 2 + BODY.encode(), {}, 400, "The body is not valid JSON"),
        (codecs.BOM_UTF8, {}, 400, "The body is not valid JSON"),
    ],
)
async def test_a_body_of_another_content_type_is_refused_with_the_right_one(
    api: httpx.AsyncClient, sent: bytes, headers: dict[str, str], status: int, detail: str
) -> None:
    answer = await post(api, "/api/jobs", sent, headers)
    assert answer.status_code == status, answer.text
    assert detail in answer.json()["detail"]


# Words


WRONG: list[Any] = [5, 1.5, True, "\0", "x" * 300, "", [], ["x" * 300], [5], {}, {"type": 5}, {"type": "json_schema"}]


@pytest.mark.parametrize(("path", "name"), [(path, field.name) for path, field in fields()])
async def test_an_invalid_field_is_explained_in_terms_of_json(api: httpx.AsyncClient, path: str, name: str) -> None:
    n_refused = 0
    for wrong in WRONG:
        answer = await api.post(path, json={NEEDED[path]: "x"} | {name: wrong})
        if answer.status_code == 400:
            n_refused += 1
            detail = answer.json()["detail"]
            assert detail.startswith(name), detail
            assert not PYTHON.search(detail), detail
    assert n_refused > 3


@pytest.mark.parametrize(
    ("method", "path", "detail"),
    [
        ("POST", "/api/jobs/cancel", "status: missing; expected one of queued, processing; at most 2 of them"),
        ("POST", "/api/jobs/cancel?status=nonsense", "status: expected one of queued, processing; at most 2 of them"),
        ("POST", "/api/jobs/cancel?status=queued&model=", "model: expected a string of at least 1 character"),
        ("POST", f"/api/jobs/retry?status=error&error_kind={'x' * 41}", "error_kind: expected a string of at most 40"),
        ("GET", "/api/jobs?texts=perhaps", "texts: expected true or false"),
        ("GET", "/api/jobs?limit=0", "limit: expected a whole number ≥ 1 and ≤ 500"),
        ("GET", "/api/jobs/1/events?after=x", "after: expected the id of an event of this stream, such as 1-42"),
    ],
)
async def test_an_invalid_query_is_explained_too(api: httpx.AsyncClient, method: str, path: str, detail: str) -> None:
    answer = await api.request(method, path)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(detail)
    assert not PYTHON.search(answer.json()["detail"])


@pytest.mark.parametrize(
    ("sent", "detail"),
    [
        ({}, "content: missing"),
        ({"content": None}, "content: expected a string, got null"),
        ({"content": []}, "content: expected a string, got a list"),
        ({"content": "x", "system_prompt": 5}, "system_prompt: expected a string or null, got a number"),
        ({"content": "x", "assistant_context": True}, "assistant_context: expected a string or null, got a boolean"),
        ({"content": "x", "max_attempts": 0}, "max_attempts: expected a whole number ≥ 1 and ≤ 100"),
        ({"content": "x", "model": "x" * 201}, "model: expected a string of at most 200 characters"),
        ({"content": "x", "priority": "urgent"}, "priority: expected one of interactive, normal, batch"),
        ([], "The body is wrong: expected an object, got a list"),
    ],
)
async def test_an_invalid_reply_is_refused_with_what_it_lacks(
    api: httpx.AsyncClient, sent: object, detail: str
) -> None:
    answer = await api.post("/api/conversations/c/reply", json=sent)
    assert (answer.status_code, answer.json()["detail"]) == (400, detail)


# Lists without texts


async def test_a_list_without_texts_is_small_and_has_every_other_field(api: httpx.AsyncClient, config: Config) -> None:
    long = "x" * 100_000
    for number in range(12):
        sent = {"content": long, "system_prompt": long, "conversation_id": f"long{number % 2}", "stop": ["y"] * 16}
        await api.post("/api/jobs", json=sent)
    with sqlite3.connect(config.database_path) as connection:
        (newest,) = connection.execute("SELECT max(id) FROM jobs").fetchone()
        connection.execute(
            "UPDATE jobs SET status = 'error', error = 'why', error_kind = 'internal', partial = ?, is_head = 0,"
            " processed_at = created_at WHERE id = ?",
            (long, newest),
        )
    connection.close()
    in_conversation, next_page = "limit=5&conversation_id=%20long1", f"limit=4&before={newest}"
    for query in ("limit=12", "limit=3", in_conversation, next_page, "status=error"):
        whole = (await api.get(f"/api/jobs?{query}")).json()["jobs"]
        answer = await api.get(f"/api/jobs?{query}&texts=false")
        brief = answer.json()["jobs"]
        assert len(answer.content) < 20_000
        assert [one["id"] for one in brief] == [one["id"] for one in whole] != []
        for one, other in zip(brief, whole, strict=True):
            assert set(one) == set(JobBrief.__struct_fields__)
            texts = {"user_input", "system_prompt", "result", "partial", "reply_problem", "thinking", "thinking_s"}
            times = {"loaded_at", "prompt_read_at", "first_token_at"}
            assert set(other) - set(one) == {*texts, *times, "parameters", "unenforced"}
            one["progress"] = other["progress"] = None
            assert one == {name: other[name] for name in one}
    (failed,) = (await api.get("/api/jobs?status=error&texts=false")).json()["jobs"]
    assert failed["error"] == {"kind": "internal", "reason": "why"}
    assert (await api.get("/api/jobs?limit=1&texts=true")).json() == (await api.get("/api/jobs?limit=1")).json()


async def test_a_list_without_texts_reads_no_text(config: Config) -> None:
    database = Database(config.database_path)
    database.open()
    statements: list[str] = []

    def read(connection: Connection) -> None:
        event.listen(connection, "before_cursor_execute", lambda *args: statements.append(args[2]))
        reads.newest_briefs(connection, 1, limit=100)

    try:
        await database.read(read)
    finally:
        await database.close()
    (statement,) = [one for one in statements if "FROM jobs" in one]
    for column in ("JOIN messages", "content", "system_prompt", "partial", "parameters"):
        assert column not in statement


# The document


async def test_the_openapi_document_states_the_exact_types(api: httpx.AsyncClient) -> None:
    document = (await api.get("/api/openapi.json")).json()
    paths, schemas = document["paths"], document["components"]["schemas"]
    known = json.dumps(document)
    for ref in set(re.findall(r'"#/components/schemas/(\w+)"', known)):
        assert ref in schemas
    assert "e+18" not in known
    assert r"\\A" not in str(schemas["LegacySubmit"])
    job_id = paths["/api/jobs/{job_id}"]["get"]["parameters"][0]["schema"]
    assert (job_id["minimum"], job_id["maximum"]) == (1, 2**63 - 1)
    assert "security" not in document
    for path, methods in paths.items():
        for operation in methods.values():
            assert ("security" in operation) is path.startswith(("/api/", "/v1/"))
    assert "503" in paths["/readyz"]["get"]["responses"]
    of_job = paths["/api/jobs/{job_id}/events"]["get"]
    assert "content" not in of_job["responses"]["204"]
    assert of_job["responses"]["200"]["content"]["text/event-stream"]["schema"] == {"type": "string"}
    of_lane = paths["/api/conversations/{conversation_id}/events"]["get"]
    for operation, good in ((of_job, "1-42"), (of_lane, "7.1-42")):
        for parameter in operation["parameters"][1:]:
            pattern = parameter["schema"]["pattern"]
            assert re.search(pattern, good)
            assert re.search(pattern, "")
            assert not re.search(pattern, "1-42\n")
            assert not re.search(pattern, "x")
