"""Every invalid request gets a 4xx that says what is wrong, stores nothing and leaves no traceback in the log."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import structlog

from llamalith_app.settings.config import Config
from tests.web.conftest import TOKEN, module_api, module_config

# Nothing is ever stored here, so one server serves all.
pytestmark = pytest.mark.asyncio(loop_scope="module")
config, api = module_config, module_api


@pytest.fixture(autouse=True)
def nothing_is_stored_and_nothing_is_logged_as_an_error(
    config: Config, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    with structlog.testing.capture_logs() as lines:
        yield
    with sqlite3.connect(config.database_path) as connection:
        for table in ("conversations", "messages", "jobs"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    connection.close()
    assert [line for line in lines if line["log_level"] in ("error", "critical")] == []
    assert caplog.records == []


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


BODIES = {
    "not JSON": (b"{", "not valid JSON"),
    "nothing at all": (b"", "empty"),
    "a list": (b"[]", "The body is wrong: expected an object, got a list"),
    "a string": (b'"content"', "The body is wrong: expected an object, got a string"),
    "null": (b"null", "null"),
    "a number for text": (body(content=5), "content: expected a string or null, got a number"),
    "null for all text": (body(content=None, system_prompt=None), "content or system_prompt is required"),
    "an object for text": (body(content={"a": 1}), "content: expected a string or null, got an object"),
    "100,000 nested brackets": (b"[" * 100_000, "nested too deeply"),
    "100,000 nested objects": (b'{"a":' * 100_000, "nested too deeply"),
    "invalid UTF-8": (b'{"content": "\xff\xfe"}', "not valid"),
    "an overlong encoding": (b'{"content": "\xc0\xaf"}', "not valid"),
    "a lone high surrogate": (b'{"content": "\\ud800"}', "not valid JSON"),
    "a lone low surrogate": (b'{"content": "\\udc00x"}', "not valid JSON"),
    "a surrogate in UTF-8": (b'{"content": "\xed\xa0\x80"}', "not valid"),
    "NUL in the prompt": (body(content="a\0b"), "content"),
    "NUL in the system prompt": (body(content="a", system_prompt="\0"), "system_prompt"),
    "NUL in the context": (body(content="a", assistant_context="b\0"), "assistant_context"),
    "NUL in the id": (body(content="a", conversation_id="b\0"), "conversation_id"),
    "NUL in the model": (body(content="a", model="b\0"), "model"),
    "NUL in the grammar's name": (body(content="a", grammar_name="b\0"), "grammar_name"),
    "a line break in the id": (body(content="a", conversation_id="b\nc"), "conversation_id"),
    "an id of 201 characters": (
        body(content="a", conversation_id="x" * 201),
        "conversation_id: expected 1 to 200 characters",
    ),
    "a number beyond int64": (b'{"content": ' + b"9" * 40 + b"}", "content"),
    "a number of 5,000 digits": (b'{"content": ' + b"9" * 5000 + b"}", ""),
    "NaN": (b'{"content": NaN}', "not valid JSON"),
    "Infinity": (b'{"content": -Infinity}', "not valid JSON"),
    "a float that overflows": (b'{"content": 1e999}', ""),
    "a prompt of 1,000,001 characters": (
        body(content="x" * 1_000_001),
        "content: expected a string of at most 1000000 characters",
    ),
    "an unknown model": (body(content="a", model="gpt-4"), "these are: smollm2, other"),
    "an unknown grammar": (body(content="a", grammar_name="xml"), "these exist: yes_or_no"),
    "a path for a grammar": (body(content="a", grammar_name="../yes_or_no"), "these exist: yes_or_no"),
    "no time at all": (body(content="a", timeout_s=0), "timeout_s: expected a number of seconds > 0 and ≤ 604800"),
    "less time than none": (
        body(content="a", queue_timeout_s=-1),
        "queue_timeout_s: expected a number of seconds > 0 and ≤ 604800",
    ),
    "more time than a week": (
        body(content="a", timeout_s=604_801),
        "timeout_s: expected a number of seconds > 0 and ≤ 604800",
    ),
    "more attempts than a hundred": (
        body(content="a", max_attempts=101),
        "max_attempts: expected a whole number ≥ 1 and",
    ),
    "a list for an id": (
        body(content="a", conversation_id=[]),
        "conversation_id: expected 1 to 200 characters without control characters, or a whole number of at most"
        " 64 bits",
    ),
    "a number beyond int64 for an id": (
        b'{"content": "a", "conversation_id": 9223372036854775808}',
        "conversation_id: expected 1 to 200 characters without control characters, or a whole number of at most"
        " 64 bits",
    ),
    "time without an end": (b'{"content": "a", "timeout_s": 1e999}', "out of range"),
    "a time that is NaN": (b'{"content": "a", "timeout_s": NaN}', "not valid JSON"),
    "a class that is none": (
        body(content="a", priority="urgent"),
        "priority: expected one of interactive, normal, batch",
    ),
    "a time that is NaN in text": (
        body(content="a", timeout_s="nan"),
        "timeout_s: expected a number of seconds > 0 and ≤ 604800",
    ),
    "a time that is text": (
        body(content="a", timeout_s="soon"),
        "timeout_s: expected a number of seconds > 0 and ≤ 604800",
    ),
    "a time that is a boolean": (
        body(content="a", queue_timeout_s=True),
        "queue_timeout_s: expected a number of seconds > 0 and ≤ 604800",
    ),
    "a context without a prompt": (
        body(system_prompt="a", assistant_context="b"),
        "assistant_context: stands before a prompt",
    ),
    "nothing to do": (body(content="  ", system_prompt=" "), "content or system_prompt is required"),
}


@pytest.mark.parametrize(("sent", "expected"), BODIES.values(), ids=BODIES.keys())
async def test_a_wrong_body_is_refused_with_the_reason(api: httpx.AsyncClient, sent: bytes, expected: str) -> None:
    answer = await api.post("/api/jobs", content=sent, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["type"] == "about:llamalith/bad-input"
    assert expected in problem["detail"]
    assert problem["error"] == problem["detail"]
    assert problem["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("sent", [b"{}", b'{"content": "  "}', b'{"content": null}', b'{"model": "smollm2"}', b"[]"])
async def test_a_reply_without_content_is_refused(api: httpx.AsyncClient, sent: bytes) -> None:
    answer = await api.post("/api/conversations/c/reply", content=sent, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "content" in answer.json()["detail"] or sent == b"[]"


@pytest.mark.parametrize("path", ["/api/submit", "/chat/api/submit"])
async def test_the_legacy_submit_needs_its_input(api: httpx.AsyncClient, path: str) -> None:
    assert (await api.post(path, json={"session_id": "x"})).status_code == 400
    answer = await api.post(path, json={"user_input": " "})
    assert answer.status_code == 400
    assert answer.json()["detail"] == "user_input is required"


@pytest.mark.parametrize(
    ("content_type", "sent"),
    [
        ("text/plain", b'{"content": "x"}'),
        ("application/x-www-form-urlencoded", b"content=x"),
        ("multipart/form-data; boundary=b", b'--b\r\n\r\n{"content": "x"}\r\n--b--'),
        ("application/msgpack", b"\x80"),
        ("application/jsonp", b'{"content": "x"}'),
        ("", b'{"content": "x"}'),
    ],
)
async def test_only_json_is_accepted(api: httpx.AsyncClient, content_type: str, sent: bytes) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    answer = await api.post("/api/jobs", content=sent, headers=headers)
    assert answer.status_code == 415
    assert "expected application/json" in answer.json()["detail"]


AN_ID = "expected a whole number ≥ 1 and ≤ 9223372036854775807"

QUERIES = {
    "limit=0": "limit: expected a whole number ≥ 1 and ≤ 500",
    "limit=501": "limit: expected a whole number ≥ 1 and ≤ 500",
    "limit=-1": "limit: expected a whole number ≥ 1 and ≤ 500",
    "limit=x": "limit: expected a whole number ≥ 1 and ≤ 500",
    "limit=": "limit: expected a whole number ≥ 1 and ≤ 500",
    "limit=1.5": "limit: expected a whole number ≥ 1 and ≤ 500",
    "limit=99999999999999999999": "limit: expected a whole number ≥ 1 and ≤ 500",
    "limit=NaN": "limit: expected a whole number ≥ 1 and ≤ 500",
    "before=0": f"before: {AN_ID}",
    "before=9223372036854775808": f"before: {AN_ID}",
    "before=abc": f"before: {AN_ID}",
}


@pytest.mark.parametrize(("query", "expected"), QUERIES.items(), ids=QUERIES.keys())
async def test_a_query_out_of_range_is_refused_with_the_range(
    api: httpx.AsyncClient, query: str, expected: str
) -> None:
    answer = await api.get(f"/api/jobs?{query}")
    assert answer.status_code == 400
    assert answer.json()["detail"] == expected


@pytest.mark.parametrize(
    "query", ["status=nonsense", "status=%00", "status=%ff", "conversation_id=nope", "conversation_id=%00"]
)
async def test_a_filter_that_matches_nothing_is_an_empty_list(api: httpx.AsyncClient, query: str) -> None:
    answer = await api.get(f"/api/jobs?{query}")
    assert (answer.status_code, answer.json()) == (200, {"jobs": []})


@pytest.mark.parametrize("job_id", ["abc", "0", "-1", "1.5", "9223372036854775808", "9" * 5000, "%00"])
async def test_an_invalid_job_id_is_bad_input(api: httpx.AsyncClient, job_id: str) -> None:
    answer = await api.get(f"/api/jobs/{job_id}")
    assert answer.status_code == 400
    assert answer.json()["detail"] == f"job_id: {AN_ID}"


@pytest.mark.parametrize("public_id", ["a%00b", "x" * 201, "a%0Ab", "%7F", "%20"])
@pytest.mark.parametrize("route", ["conversations/{}/messages", "conversations/{}/latest", "status/{}"])
async def test_an_impossible_conversation_id_is_bad_input(api: httpx.AsyncClient, public_id: str, route: str) -> None:
    answer = await api.get("/api/" + route.format(public_id))
    assert answer.status_code == 400
    assert answer.json()["detail"] == (
        "conversation_id: expected 1 to 200 characters that are not all blank, without control characters"
    )


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", "é"])
async def test_a_malformed_key_is_refused_by_the_name_of_its_header(api: httpx.AsyncClient, key: str) -> None:
    answer = await api.post("/api/jobs", json={"content": "x"}, headers={b"Idempotency-Key": key.encode()})
    assert answer.status_code == 400
    assert answer.json()["detail"] == "Idempotency-Key: expected 1 to 255 visible ASCII characters"


@pytest.mark.parametrize("path", ["/api", "/api/job", "/api/jobs/1/2/3", "/nope", "/api/jobs/1/", "/../etc"])
async def test_an_unknown_path_is_404(api: httpx.AsyncClient, path: str) -> None:
    answer = await api.get(path)
    assert answer.status_code == 404
    assert answer.json()["type"] == "about:llamalith/not-found"


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "TRACE"])
async def test_an_unknown_method_is_405_and_names_the_known_ones(api: httpx.AsyncClient, method: str) -> None:
    answer = await api.request(method, "/api/jobs")
    assert answer.status_code == 405
    assert {"GET", "POST"} <= set(answer.headers["allow"].split(", "))


TOKENS: dict[str, list[tuple[bytes, bytes]]] = {
    "none": [],
    "empty": [(b"Authorization", b"")],
    "no token": [(b"Authorization", b"Bearer")],
    "an empty token": [(b"Authorization", b"Bearer ")],
    "bytes beyond ASCII": [(b"Authorization", b"Bearer \xff\xfe\xe9")],
    "bytes beyond ASCII in the other": [(b"X-API-Token", b"\xe9")],
    "another scheme": [(b"Authorization", b"Basic " + TOKEN.encode())],
    "the token without a scheme": [(b"Authorization", TOKEN.encode())],
    "two kinds of which one is wrong": [
        (b"Authorization", b"Bearer " + TOKEN.encode()),
        (b"X-API-Token", b"nope"),
    ],
    "a longer one": [(b"X-API-Token", TOKEN.encode() + b"x")],
    "a very long one": [(b"X-API-Token", b"x" * 20_000)],
}


@pytest.mark.parametrize("headers", TOKENS.values(), ids=TOKENS.keys())
async def test_a_wrong_token_is_401(api: httpx.AsyncClient, headers: list[tuple[bytes, bytes]]) -> None:
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    answer = await raw(api, b"GET /api/jobs HTTP/1.1\r\nHost: h\r\n" + lines + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"\r\nwww-authenticate: Bearer\r\n" in answer
    assert b'"detail":"Invalid or missing token"' in answer


async def test_the_same_right_token_by_both_headers_is_right(api: httpx.AsyncClient) -> None:
    assert (await api.get("/api/jobs", headers={"X-API-Token": TOKEN})).status_code == 200


async def raw(api: httpx.AsyncClient, head: bytes, then: bytes = b"") -> bytes:
    """The answer to bytes on the wire, as far as one packet of it goes."""
    reader, writer = await asyncio.open_connection(api.base_url.host, api.base_url.port)
    writer.write(head + then)
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10) + await reader.read(4096)
    writer.close()
    return answer


def head(*lines: str) -> bytes:
    return (
        "\r\n".join(
            [
                "POST /api/jobs HTTP/1.1",
                "Host: h",
                f"X-API-Token: {TOKEN}",
                "Content-Type: application/json",
                *lines,
            ]
        ).encode()
        + b"\r\n\r\n"
    )


async def test_a_body_of_20_mb_is_refused_before_it_was_sent(api: httpx.AsyncClient) -> None:
    assert b" 413 " in await raw(api, head("Content-Length: 20000000"), b'{"content": "')


async def test_a_body_without_a_length_is_refused_when_it_grows_too_long(api: httpx.AsyncClient) -> None:
    chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    assert b" 413 " in await raw(api, head("Transfer-Encoding: chunked"), chunk * 17)


async def test_a_body_without_a_token_is_refused_before_it_is_read(api: httpx.AsyncClient) -> None:
    lines = head("Content-Length: 10000000").replace(TOKEN.encode(), b"wrong")
    assert b" 401 " in await raw(api, lines, b'{"content": "')


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: abc"],
        ["Content-Length: -1"],
        ["Content-Length: 5", "Content-Length: 6"],
        ["Bad Header: x", "Content-Length: 0"],
        ["Transfer-Encoding: gzip"],
    ],
)
async def test_broken_headers_are_400(api: httpx.AsyncClient, lines: list[str]) -> None:
    assert b" 400 " in await raw(api, head(*lines))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("Host", "h"), ("Content-Type", "application/json"), ("X-API-Token", TOKEN)),
        *(("Content-Encoding", "identity"), ("Authorization", "Basic eDp5"), ("Idempotency-Key", "k")),
        *(("Last-Event-ID", "1-1"), ("X-CSRF-Token", "x")),
    ],
)
@pytest.mark.parametrize("second", ["the same", "another"])
async def test_duplicates_of_a_single_header_are_refused(
    api: httpx.AsyncClient, name: str, value: str, second: str
) -> None:
    """Also the same twice: who reads one of them may be somebody else than who reads the other."""
    given = [f"{name}: {value}", f"{name}: {value if second == 'the same' else value + 'x'}", "Content-Length: 2"]
    lines = head().decode().split("\r\n")[:-2]
    kept = [line for line in lines if not line.startswith(f"{name}: ")]
    answer = await raw(api, "\r\n".join([*kept, *given, "", ""]).encode(), b"{}")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert f"{name}: stands twice in the headers; send it once.".encode() in answer


@pytest.mark.parametrize(
    ("sent", "status", "expected"),
    [
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400, b"Host: missing; HTTP/1.1 needs it."),
        (b"GET /healthz HTTP/1.0\r\n\r\n", 200, b""),
        (b"GET /healthz\r\n\r\n", 400, b"HTTP/0.9 is not spoken here: HTTP/1.1 is."),
        (b"GET /healthz HTTP/2.0\r\nHost: h\r\n\r\n", 400, b"HTTP/2.0 is not spoken here: HTTP/1.1 is."),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, b"This is no HTTP request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, b"This is no HTTP request"),
        (b"CONNECT h:1 HTTP/1.1\r\nHost: h:1\r\n\r\n", 400, b"This is no HTTP request: its address cannot be read."),
        (b"GET http://[ HTTP/1.1\r\nHost: h\r\n\r\n", 400, b"This is no HTTP request"),
        (head("Content-Length: 2", "Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n", 400, b"This is no HTTP"),
        (head("Content-Length: 2", "Content-Length: 2") + b"{}", 400, b"This is no HTTP request"),
        (head("Transfer-Encoding: chunked") + b"x\r\n", 400, b"This is no HTTP request"),
    ],
)
async def test_anything_but_a_request_of_http_1_is_refused_with_the_reason(
    api: httpx.AsyncClient, sent: bytes, status: int, expected: bytes
) -> None:
    with structlog.testing.capture_logs() as lines:
        answer = await raw(api, sent)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert expected in answer
    if status == 400:
        assert b"content-type: application/problem+json" in answer
        (refused,) = [line for line in lines if line["event"] == "request refused"]
        assert (refused["status"], refused["address"], refused["log_level"]) == (400, "127.0.0.1", "warning")


@pytest.mark.parametrize(
    ("query", "status", "expected"),
    [
        ("&".join(f"a{n}" for n in range(50)), 200, ""),
        ("&".join(f"a{n}" for n in range(51)), 400, "at most 50"),
        ("a=" + "x" * 8000, 200, ""),
        ("a=" + "x" * 8200, 414, "at most 8 KiB"),
    ],
)
async def test_an_address_is_bounded_in_bytes_and_fields(
    api: httpx.AsyncClient, query: str, status: int, expected: str
) -> None:
    """Litestar keeps what it makes of the last thousand queries and paths."""
    answer = await api.get(f"/chat/login?{query}")
    assert answer.status_code == status
    assert expected in answer.text
