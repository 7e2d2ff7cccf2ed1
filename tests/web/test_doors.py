"""Authentication: tokens, sessions, CSRF, hosts and logins, and limits for clients without a login."""

from __future__ import annotations

import asyncio
import itertools
import re
import sqlite3
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote_to_bytes

import bcrypt
import httpx
import msgspec
import pytest
import pytest_asyncio
import structlog
from hypothesis import given
from hypothesis import strategies as st
from litestar import Litestar
from litestar._parsers import parse_url_encoded_form_data
from litestar.routes import HTTPRoute

from llamalith_app.app import Timings, create_app
from llamalith_app.guards import forms, passwords
from llamalith_app.guards.passwords import throttled_addresses
from llamalith_app.guards.sessions import COOKIE
from llamalith_app.settings.config import Config
from llamalith_app.store import logins, sessions
from llamalith_app.store.database import Database, write_engine
from tests.settle import eventually
from tests.web.conftest import PASSWORD, PATIENT, TOKEN, log_in, serving

FORM = "application/x-www-form-urlencoded"


# Which doors there are


def handlers(config: Config) -> Iterator[tuple[str, str, dict[str, object]]]:
    app: Any = create_app(config)
    while not isinstance(app, Litestar):
        app = app.app
    for route in app.routes:
        if isinstance(route, HTTPRoute):
            for handler in route.route_handlers:
                for method in handler.http_methods:
                    if method != "OPTIONS":
                        yield route.path, method, handler.opt


def test_these_routes_are_open_and_no_others(config: Config) -> None:
    open_routes = {(path, method) for path, method, opt in handlers(config) if opt.get("open")}
    # The monitor says to everybody that it only shows.
    refusals = {(path, method) for path, method in open_routes if path.startswith("/chat/queue")}
    assert {method for _, method in refusals} == {"POST", "PUT", "PATCH", "DELETE"}
    assert open_routes - refusals == {
        ("/healthz", "GET"),
        ("/readyz", "GET"),
        ("/", "GET"),
        ("/chat/login", "GET"),
        ("/chat/offline", "GET"),
        ("/chat/sw.js", "GET"),
        ("/chat/login", "POST"),
        ("/chat/logout", "GET"),
        ("/chat/offline", "GET"),
        ("/chat/sw.js", "GET"),
        ("/chat/static/{name:str}", "GET"),
        ("/chat/static/{version:str}/{name:str}", "GET"),
        ("/chat/static/{version:str}/{folder:str}/{name:str}", "GET"),
        ("/chat/static/{version:str}/{folder:str}/{subfolder:str}/{name:str}", "GET"),
    }


def somewhere(path: str) -> str:
    return re.sub(r"\{(\w+):\w+\}", "1", path)


async def test_every_other_route_of_the_api_needs_a_token_or_a_session(config: Config) -> None:
    closed = [(somewhere(p), m) for p, m, opt in handlers(config) if not opt.get("open") and not opt.get("page")]
    assert len(closed) > 15
    async with serving(config) as client:
        del client.headers["Authorization"]
        for path, method in closed:
            answer = await client.request(method, path)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), (path, method)
        await log_in(client)
        for path, method in closed:
            # A stream goes on for ever.
            async with client.stream(method, path) as answer:
                assert answer.status_code != 401, (path, method)


async def test_every_page_redirects_to_the_login_without_a_session_even_with_a_token(config: Config) -> None:
    pages = [(somewhere(path), method) for path, method, opt in handlers(config) if opt.get("page")]
    assert len(pages) > 12
    async with serving(config) as client:
        for path, method in pages:
            answer = await client.request(method, path)
            # What SAQ's own script asks for cannot be led to a login.
            refused = (401, None) if path.startswith("/chat/queue/api/") else (303, "/chat/login")
            assert (answer.status_code, answer.headers.get("location")) == refused, (path, method)


# Sessions


def token_of(answer: httpx.Response) -> str:
    (cookie,) = [value for value in answer.headers.get_list("set-cookie") if value.startswith(f"{COOKIE}=")]
    return cookie.removeprefix(f"{COOKIE}=").partition(";")[0]


def with_session(token: str) -> dict[str, str]:
    return {"Cookie": f"{COOKIE}={token}"}


@pytest.fixture
async def client(config: Config, timings: Timings) -> AsyncIterator[httpx.AsyncClient]:
    """Nobody yet: no token, no session, and cookies only as a test sends them."""
    async with serving(config, timings) as client:
        del client.headers["Authorization"]
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nobody(module_config: Config) -> AsyncIterator[httpx.AsyncClient]:
    """As `client`, and the same for all tests that leave nothing behind but sessions."""
    async with serving(module_config) as client:
        del client.headers["Authorization"]
        yield client


async def come_in(client: httpx.AsyncClient, **headers: str) -> str:
    answer = await client.post("/chat/login", data={"password": PASSWORD}, headers=headers)
    assert answer.status_code == 303, answer.text
    client.cookies.clear()
    return token_of(answer)


async def opens(client: httpx.AsyncClient, token: str) -> bool:
    client.cookies.clear()
    page = await client.get("/chat/", headers=with_session(token))
    api = await client.get("/api/jobs", headers=with_session(token))
    assert (page.status_code, api.status_code) in ((200, 200), (303, 401))
    return api.status_code == 200


async def test_a_session_opens_pages_and_api_until_logout(client: httpx.AsyncClient) -> None:
    token = await come_in(client)
    assert await opens(client, token)
    answer = await client.get("/chat/logout", headers=with_session(token))
    assert (answer.status_code, answer.headers["location"], token_of(answer)) == (303, "/chat/login", '""')
    assert not await opens(client, token), "not even for somebody who stole the cookie"


async def test_a_cookie_is_httponly_and_samesite_and_secure_over_https(config: Config) -> None:
    trusting = msgspec.structs.replace(config, trusted_proxies=("127.0.0.1",))
    async with serving(trusting) as client:
        del client.headers["Authorization"]
        plain = await client.post("/chat/login", data={"password": PASSWORD})
        secure = await client.post("/chat/login", data={"password": PASSWORD}, headers={"X-Forwarded-Proto": "https"})
    flags = [set(answer.headers["set-cookie"].split("; ")[1:]) - {"Max-Age=604800"} for answer in (plain, secure)]
    assert flags == [{"HttpOnly", "Path=/", "SameSite=lax"}, {"HttpOnly", "Path=/", "SameSite=lax", "Secure"}]


async def test_a_session_token_chosen_by_the_client_is_never_used(client: httpx.AsyncClient) -> None:
    planted = "A" * 43
    token = await come_in(client, **with_session(planted))
    assert token != planted
    assert not await opens(client, planted)
    again = await come_in(client, **with_session(token))
    assert again != token
    assert not await opens(client, token), "one login ends the session that it came with"
    assert await opens(client, again)


async def test_the_database_holds_no_usable_token(client: httpx.AsyncClient, database_path: Path) -> None:
    token = await come_in(client)
    for file in (database_path, database_path.with_name(database_path.name + "-wal")):
        assert token.encode() not in file.read_bytes()


@pytest.mark.parametrize("change", ["admin_password_hash", "secret_key"])
async def test_a_new_password_or_secret_key_ends_every_session(
    config: Config, client: httpx.AsyncClient, change: str
) -> None:
    token = await come_in(client)
    new = {"admin_password_hash": bcrypt.hashpw(b"new", bcrypt.gensalt(4)).decode(), "secret_key": "another " * 8}
    async with serving(msgspec.structs.replace(config, **{change: new[change]})) as later:
        del later.headers["Authorization"]
        assert not await opens(later, token)
    assert await opens(client, token)


@pytest.mark.parametrize(
    ("column", "age", "alive"),
    [
        ("seen_at", timedelta(hours=11, minutes=59), True),
        ("seen_at", timedelta(hours=12, minutes=1), False),
        ("created_at", timedelta(days=6, hours=23), True),
        ("created_at", timedelta(days=7, minutes=1), False),
    ],
)
async def test_a_session_ends_after_12_hours_without_use_and_after_7_days(
    client: httpx.AsyncClient, database_path: Path, column: str, age: timedelta, alive: bool
) -> None:
    token = await come_in(client)
    make_older(database_path, column, age)
    assert await opens(client, token) is alive


async def test_a_person_s_requests_keep_a_session_alive_and_polling_does_not(
    client: httpx.AsyncClient, database_path: Path
) -> None:
    token = await come_in(client)
    make_older(database_path, "seen_at", timedelta(hours=1))
    before = seen_at(database_path)
    await client.get("/chat/jobs/rows", headers=with_session(token))
    assert seen_at(database_path) == before
    await client.get("/chat/jobs", headers=with_session(token))

    async def is_noted() -> bool:
        return seen_at(database_path) > before

    await eventually(is_noted)


def make_older(database_path: Path, column: str, age: timedelta) -> None:
    with sqlite3.connect(database_path) as connection:
        connection.execute(f"UPDATE sessions SET {column} = ?", (str(datetime.now(UTC).replace(tzinfo=None) - age),))
    connection.close()


def seen_at(database_path: Path) -> str:
    with sqlite3.connect(database_path) as connection:
        found: str = connection.execute("SELECT seen_at FROM sessions").fetchone()[0]
    connection.close()
    return found


async def test_expired_sessions_are_deleted_at_the_next_login(client: httpx.AsyncClient, database: Database) -> None:
    now = datetime.now(UTC)
    await database.write(sessions.begin, "old", 1, now - timedelta(days=8))
    await come_in(client)
    assert await database.read(sessions.active_session, "old", now - timedelta(days=8)) is None


GARBAGE = ["", "x", "A" * 43, "A" * 4000, "\xff\xfe", "a=b; c", '"quoted"', "%00", "é", "../../etc", "' OR 1=1 --"]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("value", GARBAGE)
async def test_garbage_in_a_cookie_is_neither_a_session_nor_an_error(nobody: httpx.AsyncClient, value: str) -> None:
    nobody.cookies.clear()
    headers = [(b"cookie", f"{COOKIE}={value}; llamalith_next={value}".encode())]
    assert (await nobody.get("/chat/", headers=headers)).status_code == 303
    assert (await nobody.get("/api/jobs", headers=headers)).status_code == 401
    assert (await nobody.get("/chat/login", headers=headers)).status_code == 200


# Back to where one was going


async def test_the_root_url_redirects_to_the_pages(client: httpx.AsyncClient) -> None:
    answer = await client.get("/")
    assert (answer.status_code, answer.headers["location"]) == (303, "/chat/")


async def test_a_login_leads_on_to_the_page_that_was_asked_for(client: httpx.AsyncClient) -> None:
    sent_away = await client.get("/chat/jobs?status=done&before=7")
    assert sent_away.headers["location"] == "/chat/login"
    form = await client.get("/chat/login")
    (target,) = re.findall(r'name="next" value="([^"]*)"', form.text)
    assert target == "/chat/jobs?status=done&amp;before=7"
    answer = await client.post("/chat/login", data={"password": PASSWORD, "next": target.replace("&amp;", "&")})
    assert answer.headers["location"] == "/chat/jobs?status=done&before=7"
    assert (await client.get("/chat/login")).headers["location"] == "/chat/", "the target was sent once"


PAGES = [
    *("/chat/jobs", "/chat/queue/", "/chat/conversations/a%20b?before=3", "/chat/conversation?id=a%2Fb+c"),
    *("/chat/conversations/a%2525b", "/chat/conversations/a%3Fb", "/chat/conversations/%23", "/chat/conversations/%5C"),
    *("/chat/conversations/%22%27%3B%2C", "/chat/conversations/%F0%9F%90%89"),
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", PAGES)
async def test_a_login_leads_back_to_any_page_of_ours_with_its_query(nobody: httpx.AsyncClient, path: str) -> None:
    nobody.cookies.clear()
    assert (await nobody.get(path)).headers["location"] == "/chat/login"
    form = await nobody.get("/chat/login")
    (target,) = re.findall(r'name="next" value="([^"]*)"', form.text)
    answer = await nobody.post("/chat/login", data={"password": PASSWORD, "next": unescape(target)})
    assert answer.headers["location"] == path


async def test_the_url_to_go_back_to_is_no_longer_than_proxies_accept(client: httpx.AsyncClient) -> None:
    for path in ("/chat/" + "é" * 1000, "/chat/conversations/" + "%F0%9F%90%89" * 200):
        answer = await client.post("/chat/login", data={"password": PASSWORD, "next": path})
        assert answer.headers["location"] == "/chat/"
        client.cookies.clear()
        assert sum(map(len, (await client.get(path)).headers.values())) < 4000


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "path",
    [
        *("//evil.example", "/\\evil.example", "\\\\evil.example", "https://evil.example/chat/", "/chat//evil.example"),
        *("javascript:alert(1)", "/chat/\t/evil", "/chat/\r\nSet-Cookie: a=b", "chat/", " /chat/", "/chatter", ""),
        *("/chat/logout", "/chat/login", "/chat/api/jobs", "/api/jobs", "/chat/\\evil", "/chat/é\x00", "/" * 2500),
        *("/chat/" + "a" * 5000, "/chat@evil.example", "%2F%2Fevil.example", "/chat/./logout", "/chat/x/../logout"),
        *("/chat/%2e%2e/evil", "/chat/%2E/logout", "/chat/%6cogout", "/chat/../evil", "/chat/a/../../evil"),
    ],
)
async def test_a_login_leads_nowhere_else(nobody: httpx.AsyncClient, path: str) -> None:
    nobody.cookies.clear()
    answer = await nobody.post("/chat/login", data={"password": PASSWORD, "next": path})
    assert answer.status_code == 303
    assert answer.headers["location"] == "/chat/"
    nobody.cookies.clear()
    shown = await nobody.get("/chat/login", params={"next": path})
    assert shown.status_code == 200
    assert "evil" not in shown.text


# What a page on another site, or on another port, may not do

OTHER = "http://127.0.0.1:1"
ORIGINS = {"own": None, "none": "", "another port": OTHER, "null": "null", "another site": "https://evil.example"}
SITES = {"none sent": "", "same-origin": "same-origin", "same-site": "same-site", "cross-site": "cross-site"}
CREDENTIALS = ("session", "session and csrf token", "bearer", "bearer and session", "wrong bearer and session")
BODIES = {
    "application/json": b'{"content": "x"}',
    "text/plain": b'{"content": "x"}',
    FORM: b"content=x",
    "multipart/form-data; boundary=b": b'--b\r\nContent-Disposition: form-data; name="content"\r\n\r\nx\r\n--b--\r\n',
}


@pytest.mark.slow
async def test_the_matrix_of_unsafe_requests_to_the_api(config: Config) -> None:
    """Method, content type, Origin, Sec-Fetch-Site and credentials in every combination, answered by the rules."""
    n_asked = 0
    async with serving(config) as client:
        del client.headers["Authorization"]
        own = str(client.base_url).rstrip("/")
        session, csrf_token = await session_and_csrf_token(client)
        for method, media_type, origin, site, credentials in itertools.product(
            ("POST", "DELETE"), BODIES, ORIGINS, SITES, CREDENTIALS
        ):
            headers = {"Content-Type": media_type, "Sec-Fetch-Site": SITES[site]}
            headers["Origin"] = own if origin == "own" else ORIGINS[origin] or ""
            headers = {name: value for name, value in headers.items() if value}
            if "session" in credentials:
                headers |= with_session(session)
            if "csrf" in credentials:
                headers["X-CSRF-Token"] = csrf_token
            if "bearer" in credentials:
                headers["Authorization"] = f"Bearer {'wrong' if 'wrong' in credentials else TOKEN}"
            answer = await client.request(method, "/api/jobs", headers=headers, content=BODIES[media_type])
            asked = (method, media_type, origin, site, credentials)
            assert answer.status_code == expected(*asked), asked
            n_asked += 1
    assert n_asked == 2 * 4 * 5 * 4 * 5


def expected(method: str, media_type: str, origin: str, site: str, credentials: str) -> int:
    if method == "DELETE":
        # No such route: nobody is asked who he is.
        return 405
    if credentials == "wrong bearer and session":
        return 401
    if "bearer" not in credentials:
        foreign = origin in ("another port", "null", "another site") or site in ("same-site", "cross-site")
        proven = "csrf" in credentials or origin == "own" or site == "same-origin"
        if foreign or not proven:
            return 403
    return 200 if media_type == "application/json" else 415


async def session_and_csrf_token(client: httpx.AsyncClient) -> tuple[str, str]:
    session = await come_in(client)
    page = await client.get("/chat/", headers=with_session(session))
    client.cookies.clear()
    return session, re.findall(r'name="csrf_token" value="(\w+)"', page.text)[0]


async def test_a_form_without_an_origin_needs_its_session_s_csrf_token(client: httpx.AsyncClient) -> None:
    session, csrf_token = await session_and_csrf_token(client)
    _, another = await session_and_csrf_token(client)

    async def send(token: str) -> httpx.Response:
        fields = {"content": "typed with <care>", "csrf_token": token}
        return await client.post("/chat/jobs", data=fields, headers=with_session(session))

    for wrong in ("", "x", another, csrf_token[:-1], csrf_token + "0", "é", "\x00"):
        answer = await send(wrong)
        assert answer.status_code == 403
        assert "out of date" in answer.text
        assert "typed with &lt;care&gt;" in answer.text, "nothing typed is lost"
        assert csrf_token in answer.text, "and the form can be sent again"
    assert (await client.get("/api/jobs", headers=with_session(session))).json() == {"jobs": []}
    assert (await send(csrf_token)).status_code == 303


@pytest.mark.parametrize("scheme", ["Basic dXNlcjpwYXNz", "Digest username=x", "Negotiate", TOKEN, ""])
async def test_credentials_of_another_scheme_do_not_count_as_a_second_token(
    client: httpx.AsyncClient, scheme: str
) -> None:
    """A proxy's own, which browsers then send with every request."""
    session = await come_in(client)
    other = {"Authorization": scheme}
    for path in ("/api/jobs", "/chat/api/jobs", "/api/models"):
        assert (await client.get(path, headers=other | with_session(session))).status_code == 200
        assert (await client.get(path, headers=other | {"X-API-Token": TOKEN})).status_code == 200
        assert (
            await client.get(path, headers=other | {"X-API-Token": "wrong"} | with_session(session))
        ).status_code == 401
        assert (await client.get(path, headers=other | with_session("A" * 43))).status_code == 401
        assert (await client.get(path, headers=other)).status_code == 401
    assert (await client.get("/chat/", headers=other | with_session(session))).status_code == 200
    await client.post("/api/jobs", json={"content": "x", "conversation_id": "c"}, headers={"X-API-Token": TOKEN})
    async with client.stream("GET", "/chat/api/conversations/c/events", headers=other | with_session(session)) as live:
        assert live.status_code == 200


async def test_a_session_with_credentials_of_another_scheme_is_still_checked_for_csrf(
    client: httpx.AsyncClient,
) -> None:
    session = await come_in(client)
    headers = {"Authorization": "Basic dXNlcjpwYXNz", "Origin": OTHER} | with_session(session)
    assert (await client.post("/api/jobs", json={"content": "x"}, headers=headers)).status_code == 403


async def test_a_login_sent_by_another_site_is_refused(client: httpx.AsyncClient) -> None:
    for headers in ({"Origin": OTHER}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        answer = await client.post("/chat/login", data={"password": PASSWORD}, headers=headers)
        assert answer.status_code == 403
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "site_headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        # What browsers send in plain HTTP.
        {"Referer": "http://127.0.0.1:1/"},
        {"Referer": "https://evil.example/page"},
    ],
)
async def test_another_site_cannot_log_a_person_out(client: httpx.AsyncClient, site_headers: dict[str, str]) -> None:
    session = await come_in(client)
    asked = await client.get("/chat/logout", headers={**with_session(session), **site_headers})
    assert asked.status_code == 200
    assert "Log out?" in asked.text
    assert "set-cookie" not in asked.headers
    assert await opens(client, session)
    posted = await client.post("/chat/logout", headers={**with_session(session), **site_headers})
    assert posted.status_code == 403
    assert await opens(client, session)


async def test_our_own_link_logs_a_person_out(client: httpx.AsyncClient) -> None:
    session = await come_in(client)
    headers = {**with_session(session), "Referer": f"{client.base_url}/chat/", "Sec-Fetch-Site": "same-origin"}
    assert (await client.get("/chat/logout", headers=headers)).status_code == 303
    assert not await opens(client, session)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("host", "origin", "ours"),
    [
        ("example.org", "http://example.org", True),
        ("example.org:80", "http://example.org", True),
        ("Example.ORG", "http://example.org", True),
        ("[::1]:8000", "http://[::1]:8000", True),
        ("example.org", "https://example.org", True),
        ("example.org:8443", "https://example.org:8443", True),
        ("example.org", "http://example.org:8000", False),
        ("example.org:8000", "http://example.org", False),
        ("example.org", "http://example.org.evil.example", False),
        ("example.org", "http://example.org@evil.example", False),
        ("example.org", "null", False),
        ("example.org", "http://a:b", False),
        ("example.org", "ftp://example.org", False),
        ("example.org", "http://", False),
    ],
)
async def test_an_origin_is_ours_if_the_request_was_sent_to_it(
    nobody: httpx.AsyncClient, host: str, origin: str, ours: bool
) -> None:
    headers = {"Host": host, "Origin": origin}
    answer = await nobody.post("/chat/login", data={"password": PASSWORD}, headers=headers)
    assert answer.status_code == (303 if ours else 403)


async def test_if_there_are_several_origins_each_must_be_ours(client: httpx.AsyncClient) -> None:
    own = str(client.base_url).rstrip("/")
    for headers in (
        [("Origin", own), ("Origin", OTHER)],
        [("Origin", own), ("Sec-Fetch-Site", "same-origin"), ("Sec-Fetch-Site", "cross-site")],
    ):
        answer = await client.post("/chat/login", data={"password": PASSWORD}, headers=headers)
        assert answer.status_code == 403


async def test_a_proxy_that_terminates_tls_without_being_configured_locks_nobody_out(client: httpx.AsyncClient) -> None:
    """nginx sends the Host on; that https ended there reaches only a server that trusts it."""
    headers = {"Host": "chat.example.org", "Origin": "https://chat.example.org"}
    answer = await client.post("/chat/login", data={"password": PASSWORD}, headers=headers)
    assert answer.status_code == 303


# Under which Host


HOSTS = ("chat.example.org", "llama.lan:8443", "[::1]:8000")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(
            ("chat.example.org", 200),
            ("chat.example.org:81", 200),
            ("Chat.Example.ORG", 200),
            ("chat.example.org.", 200),
        ),
        *(("llama.lan:8443", 200), ("llama.lan", 421), ("llama.lan:8444", 421), ("[::1]:8000", 200), ("[::1]", 421)),
        *(("127.0.0.1:8000", 421), ("localhost", 421), ("evil.example", 421), ("a.chat.example.org", 421)),
        *(("chat.example.org.evil.example", 421), ("", 421)),
    ],
)
async def test_if_hosts_are_configured_no_other_host_is_answered(config: Config, host: str, status: int) -> None:
    async with serving(msgspec.structs.replace(config, allowed_hosts=HOSTS)) as client:
        for path in ("/chat/login", "/api/jobs", "/chat/static/app.css"):
            answer = await client.get(path, headers={"Host": host})
            assert answer.status_code == status, path
            if status == 421:
                assert answer.json()["type"] == "about:llamalith/misdirected-request"
                assert "LLAMALITH_ALLOWED_HOSTS" in answer.json()["detail"]
        assert (await client.get("/healthz", headers={"Host": host})).status_code == 200
        assert (await client.get("/readyz", headers={"Host": host})).status_code in (200, 503)


async def test_a_host_header_without_a_port_matches_both_usual_ports(config: Config) -> None:
    async with serving(msgspec.structs.replace(config, allowed_hosts=("a.example:443", "b.example:80"))) as client:
        for host in ("a.example", "b.example"):
            assert (await client.get("/chat/login", headers={"Host": host})).status_code == 200
        assert (await client.get("/chat/login", headers={"Host": "a.example:8000"})).status_code == 421


@pytest.mark.parametrize(
    ("allowed", "host", "shown"),
    [
        ((), "evil.example", "http://127.0.0.1:8000"),
        ((), "localhost:8010", "http://localhost:8010"),
        ((), "[::1]:8010", "http://[::1]:8010"),
        ((), "192.168.1.5:8010", "http://192.168.1.5:8010"),
        (("chat.example.org",), "chat.example.org:8443", "http://chat.example.org:8443"),
    ],
)
async def test_urls_shown_for_copying_never_contain_an_unconfigured_name(
    config: Config, allowed: tuple[str, ...], host: str, shown: str
) -> None:
    async with serving(msgspec.structs.replace(config, allowed_hosts=allowed)) as client:
        client.headers["Host"] = host
        token = await come_in(client)
        page = (await client.get("/chat/docs", headers=with_session(token))).text
    assert f"curl -s {shown}/chat/api/jobs" in page
    assert "evil" not in page


@pytest.mark.usefixtures("stopped_clock")
async def test_failures_under_a_rebound_name_slow_down_only_that_name(client: httpx.AsyncClient) -> None:
    """Its browser is on the admin's machine, so that it has the admin's address."""

    async def attempt(host: str, password: str) -> int:
        return (await client.post("/chat/login", data={"password": password}, headers={"Host": host})).status_code

    own = client.base_url.netloc.decode()
    for _ in range(logins.FREE_FAILURES + 1):
        last = await attempt("evil.example", "wrong")
    assert last == 429
    assert await attempt("evil.example:1", PASSWORD) == 429, "another port is no other name"
    for host in (own, "localhost", "chat.example.org"):
        assert await attempt(host, PASSWORD) == 303


@pytest.mark.slow
def test_inventing_host_names_gives_no_more_guesses_or_rows_than_a_few_names(database_path: Path) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    with attempting(database_path) as attempt:
        for client in ("192.0.2.1", "2001:db8:1:2::3"):
            waits = [attempt(client, now, f"name{number}") for number in range(100) for _ in range(2)]
            # Two for each of four names, and what all others have together.
            assert sum(not wait for wait in waits) == 2 * logins.MAX_HOSTS_PER_ADDRESS + logins.FREE_FAILURES
            assert not attempt(client, now, "name0"), "the failures of a known name are still its own"
            assert not attempt(client, now), "and the address itself has none"
    with sqlite3.connect(database_path) as connection:
        keys = [key for (key,) in connection.execute("SELECT address FROM login_failures")]
    connection.close()
    assert len(keys) == 1 + 3 * (logins.MAX_HOSTS_PER_ADDRESS + 2)
    assert max(map(len, keys)) <= 64


@pytest.mark.usefixtures("stopped_clock")
async def test_invented_host_names_lock_nobody_out_of_a_configured_or_known_one(config: Config) -> None:
    async def attempt(client: httpx.AsyncClient, host: str, password: str = PASSWORD) -> int:
        return (await client.post("/chat/login", data={"password": password}, headers={"Host": host})).status_code

    async with serving(config) as client:
        assert await attempt(client, "known.example.org") == 303
        for number in range(logins.MAX_HOSTS_PER_ADDRESS):
            assert await attempt(client, f"evil{number}.example", "wrong") == 401
        for _ in range(logins.FREE_FAILURES):
            assert await attempt(client, "evil.example", "wrong") == 401
        assert await attempt(client, "other.example.org") == 429
        assert await attempt(client, "known.example.org:8443") == 303
        for _ in range(logins.FREE_FAILURES):
            assert await attempt(client, "known.example.org", "wrong") == 401
        assert await attempt(client, "known.example.org") == 429, "a known name has no more guesses than any"
    async with serving(msgspec.structs.replace(config, allowed_hosts=("other.example.org",))) as client:
        assert await attempt(client, "other.example.org") == 303


def test_a_correct_password_under_a_shared_name_clears_no_other_name_and_adds_few_rows(database_path: Path) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    engine = write_engine(database_path)

    def attempt(host: str, at: datetime, *, is_right: bool = False) -> timedelta:
        with engine.begin() as connection:
            reserved = logins.reserve(connection, ("192.0.2.1",), host, at)
            if is_right and not reserved.wait:
                logins.record_success(connection, reserved.keys, host, at)
            return reserved.wait

    for number in range(logins.MAX_HOSTS_PER_ADDRESS):
        attempt(f"evil{number}", now)
    for _ in range(logins.FREE_FAILURES - 1):
        assert not attempt("evil", now)
    for number in range(50):
        assert not attempt(f"own{number}", now + timedelta(seconds=number), is_right=True)
    now += timedelta(seconds=50)
    assert not attempt("evil", now)
    assert attempt("evil", now)
    assert not attempt("own49", now)
    with engine.connect() as connection:
        proven = connection.exec_driver_sql("SELECT count(*) FROM login_failures WHERE address LIKE '+%'").scalar_one()
    assert proven == logins.MAX_PROVEN_HOSTS
    later = now + logins.PROVEN_TTL
    for number in range(logins.MAX_HOSTS_PER_ADDRESS):
        attempt(f"evil{number}", later)
    for _ in range(logins.FREE_FAILURES):
        assert not attempt("evil", later)
    assert attempt("own49", later), "it was forgotten"
    engine.dispose()


# Passwords


@pytest.mark.parametrize(
    "password",
    [
        *("", "x", PASSWORD + " ", PASSWORD.upper(), "x" * 72, "x" * 73, "x" * 16_000, "\x00", f"{PASSWORD}\x00"),
        *("🐉" * 30, "a\nb", "%", "&password=", "\udc80".encode("utf-8", "surrogatepass").decode("latin-1")),
    ],
)
async def test_any_other_password_is_wrong(client: httpx.AsyncClient, password: str) -> None:
    answer = await client.post("/chat/login", data={"password": password})
    assert answer.status_code == 401
    assert "Wrong password." in answer.text
    assert "set-cookie" not in answer.headers


async def test_bytes_that_are_not_utf_8_are_a_wrong_password(client: httpx.AsyncClient) -> None:
    answer = await client.post("/chat/login", content=b"password=%ff%fe", headers={"Content-Type": FORM})
    assert answer.status_code == 401


async def test_a_password_that_begins_with_the_right_72_bytes_is_wrong(config: Config) -> None:
    password = "p" * 72
    hashed = bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()
    async with serving(msgspec.structs.replace(config, admin_password_hash=hashed)) as client:
        longer = await client.post("/chat/login", data={"password": password + "p"})
        right = await client.post("/chat/login", data={"password": password})
    assert (longer.status_code, right.status_code) == (401, 303)


async def test_unknown_form_fields_are_ignored(client: httpx.AsyncClient) -> None:
    fields = {"password": PASSWORD, "username": "root", "user_id": "2", "is_admin": "1"}
    assert (await client.post("/chat/login", data=fields)).status_code == 303


@pytest.mark.parametrize("media_type", ["application/json", "text/plain", "multipart/form-data; boundary=b", ""])
async def test_a_login_is_accepted_as_a_form_only(client: httpx.AsyncClient, media_type: str) -> None:
    answer = await client.post("/chat/login", content=b"password=x", headers={"Content-Type": media_type})
    assert answer.status_code == 415


async def test_a_form_is_not_kept_in_memory_after_its_answer(client: httpx.AsyncClient) -> None:
    """Litestar keeps the last thousand forms that it parsed itself."""
    for number in range(3):
        await client.post("/chat/login", data={"password": f"secret {number}"})
    assert parse_url_encoded_form_data.cache_info().currsize == 0


async def test_a_form_with_too_many_fields_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post("/chat/login", content=b"a&" * 1000, headers={"Content-Type": FORM})
    assert answer.status_code == 400
    assert "at most 50" in answer.json()["detail"]


async def test_a_login_of_16_kib_is_accepted_and_a_larger_one_refused(client: httpx.AsyncClient) -> None:
    fits = 16 * 1024 - len("password=")
    big = await client.post("/chat/login", data={"password": "x" * fits})
    too_big = await client.post("/chat/login", data={"password": "x" * (fits + 1)})
    assert (big.status_code, too_big.status_code) == (401, 413)
    assert too_big.json()["detail"] == "The body is too large: at most 16 KiB before a login."


@pytest.fixture
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second of the throttle passes, however long a test takes."""
    now = datetime.now(UTC)
    monkeypatch.setattr("llamalith_app.guards.passwords.datetime", SimpleNamespace(now=lambda _: now))


async def test_other_requests_are_answered_while_passwords_are_checked(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = msgspec.structs.replace(config, trusted_proxies=("127.0.0.1",))
    begun, may_end = threading.Semaphore(0), threading.Event()

    def slow_check(password: bytes, hashed: bytes) -> bool:
        begun.release()
        may_end.wait(10)
        return False

    monkeypatch.setattr("llamalith_app.guards.passwords.bcrypt.checkpw", slow_check)
    async with serving(settings) as client:

        async def guess(number: int) -> int:
            headers = {"X-Forwarded-For": f"192.0.2.{number}"}
            return (await client.post("/chat/login", data={"password": "wrong"}, headers=headers)).status_code

        guesses = [asyncio.create_task(guess(number)) for number in range(8)]
        await asyncio.to_thread(begun.acquire)
        assert (await client.get("/healthz")).status_code == 200
        assert not any(task.done() for task in guesses)
        may_end.set()
        assert await asyncio.gather(*guesses) == [401] * 8


@pytest.mark.slow
@pytest.mark.usefixtures("stopped_clock")
async def test_a_flood_of_logins_from_one_address_does_not_block_another(config: Config) -> None:
    settings = msgspec.structs.replace(
        config,
        admin_password_hash=bcrypt.hashpw(b"x", bcrypt.gensalt(10)).decode(),
        trusted_proxies=("127.0.0.1",),
    )
    async with serving(settings) as client:
        answers = await asyncio.gather(
            *(
                client.post("/chat/login", data={"password": given}, headers={"X-Forwarded-For": address})
                for given, address in [*[("wrong", "192.0.2.1")] * 60, ("x", "192.0.2.2")]
            )
        )
    statuses = [answer.status_code for answer in answers]
    assert statuses[-1] == 303
    assert statuses.count(401) == logins.FREE_FAILURES
    assert statuses.count(429) == 60 - logins.FREE_FAILURES


@pytest.mark.usefixtures("stopped_clock")
@pytest.mark.parametrize(
    ("addresses", "places"),
    [
        (["192.0.2.1"], {"MAX_UNCONFIGURED_PER_ADDRESS": 24}),
        (["192.0.2.1", "192.0.2.2"], {"MAX_WAITING": 8, "MAX_WAITING_UNCONFIGURED": 6}),
    ],
    ids=["of an address", "of all"],
)
async def test_a_flood_of_logins_under_unconfigured_names_does_not_block_an_ip_address_host(
    config: Config,
    database_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    addresses: list[str],
    places: dict[str, int],
) -> None:
    for name, n_places in places.items():
        monkeypatch.setattr(passwords, name, n_places)
    may_end = threading.Event()

    def slow_check(password: bytes, _: bytes) -> bool:
        may_end.wait(20)
        return password == PASSWORD.encode()

    monkeypatch.setattr("llamalith_app.guards.passwords.bcrypt.checkpw", slow_check)

    async with serving(msgspec.structs.replace(config, trusted_proxies=("127.0.0.1",))) as client:

        async def attempt(password: str, address: str, **headers: str) -> int:
            headers["X-Forwarded-For"] = address
            return (await client.post("/chat/login", data={"password": password}, headers=headers)).status_code

        def counted() -> int:
            with closing(sqlite3.connect(database_path)) as connection:
                return int(connection.execute("SELECT total(n_failures) FROM login_failures").fetchone()[0]) // 2

        flood = [
            asyncio.create_task(attempt("wrong", address, Host=f"evil{number}.example"))
            for address in addresses
            for number in range(logins.MAX_HOSTS_PER_ADDRESS + 1)
            for _ in range(logins.FREE_FAILURES)
        ]
        n_strange = min(places.values()) if len(addresses) > 1 else places["MAX_UNCONFIGURED_PER_ADDRESS"]

        async def is_full() -> bool:
            return counted() == n_strange and sum(task.done() for task in flood) == len(flood) - n_strange

        async def has_come() -> bool:
            return own.done() or counted() > n_strange

        await eventually(is_full)
        own = asyncio.create_task(attempt(PASSWORD, addresses[0]))
        await eventually(has_come)
        may_end.set()
        assert await own == 303
        assert sorted(await asyncio.gather(*flood)) == [401] * n_strange + [429] * (len(flood) - n_strange)


@pytest.mark.usefixtures("stopped_clock")
@pytest.mark.parametrize("timings", [msgspec.structs.replace(PATIENT, lock_deadline_s=0.1)], ids=["impatient"])
async def test_a_throttled_client_is_answered_without_waiting_for_the_writer(
    client: httpx.AsyncClient, database_path: Path
) -> None:
    for _ in range(logins.FREE_FAILURES):
        assert (await client.post("/chat/login", data={"password": "wrong"})).status_code == 401
    with closing(sqlite3.connect(database_path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert (await client.post("/chat/login", data={"password": PASSWORD})).status_code == 429


# What a form may become before its sender has shown a login


@pytest.mark.parametrize("told_length", [True, False], ids=["Content-Length", "chunked"])
@pytest.mark.parametrize("path", ["/chat/jobs", "/chat/login", "/chat/logout", "/chat/jobs/1/cancel", "/api/jobs"])
async def test_a_long_body_without_a_login_is_refused_before_it_was_sent(
    client: httpx.AsyncClient, path: str, told_length: bool
) -> None:
    length = "Content-Length: 15000000" if told_length else "Transfer-Encoding: chunked"
    body = b"content=" + b'"' * 20_000
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    lines = [f"POST {path} HTTP/1.1", "Host: h", f"Content-Type: {FORM}", "Accept: text/html", length, "", ""]
    writer.write("\r\n".join(lines).encode() + (body if told_length else b"%x\r\n%b\r\n" % (len(body), body)))
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    assert int(head.split()[1]) == (413 if path == "/chat/login" else 401)
    assert int(re.findall(rb"content-length: (\d+)", head)[0]) < 10_000
    writer.close()


async def test_a_draft_too_long_for_a_login_stays_in_the_browser_and_the_login_leads_back_to_its_form(
    client: httpx.AsyncClient,
) -> None:
    headers = {"Accept": "text/html", "Referer": f"{client.base_url}/chat/conversations/c?before=3"}
    answer = await client.post("/chat/jobs", data={"content": "x" * 20_000}, headers=headers)
    assert answer.status_code == 401
    assert "It was not sent. Your browser keeps it" in answer.text
    (target,) = re.findall(r'name="next" value="([^"]*)"', answer.text)
    answer = await client.post("/chat/login", data={"password": PASSWORD, "next": unescape(target)})
    assert answer.headers["location"] == "/chat/conversations/c?before=3"


@pytest.mark.parametrize("text", ['"' * 3900, "<&'" * 1300, "é" * 1950, "🐉" * 950, "a\r\n" * 1700])
async def test_the_longest_kept_draft_survives_a_wrong_and_a_right_password(
    client: httpx.AsyncClient, text: str
) -> None:
    kept = await client.post("/chat/jobs", data={"content": text, "conversation_id": "c"})
    for password, status in (("wrong", 401), (PASSWORD, 200)):
        assert len(kept.content) < 5 * forms.ANONYMOUS_BYTES
        fields = {name: unescape(value) for name, value in re.findall(r'name="(\w+)" value="([^"]*)"', kept.text)}
        kept = await client.post("/chat/login", data=fields | {"password": password})
        assert kept.status_code == status, kept.text[:200]
    (shown,) = re.findall(r'<textarea[^>]*name="content"[^>]*>\n(.*?)</textarea>', kept.text, re.DOTALL)
    assert unescape(shown) == text.replace("\r\n", "\n")


async def test_a_draft_that_is_shown_again_is_limited(client: httpx.AsyncClient) -> None:
    session, csrf_token = await session_and_csrf_token(client)
    headers = {**with_session(session), "Content-Type": FORM, "Accept": "text/html"}
    for token, status in ((csrf_token, 400), ("stale", 403)):
        body = f"csrf_token={token}&content=".encode() + b'"' * 2_000_000
        answer = await client.post("/chat/jobs", content=body, headers=headers)
        assert answer.status_code == status
        assert "It is too long to be shown here again: go back" in answer.text
        assert len(answer.content) < 20_000
        for field in ("conversation_id", "model", "once"):
            body = f"csrf_token={token}&content=x&{field}=".encode() + b'"' * 100_000
            answer = await client.post("/chat/jobs", content=body, headers=headers)
            assert answer.status_code == status
            assert len(answer.content) < 30_000, field
            assert ">\nx</textarea>" in answer.text


# Throttling


@pytest.mark.usefixtures("stopped_clock")
async def test_guesses_are_slowed_down_more_and_more(client: httpx.AsyncClient) -> None:
    for _ in range(logins.FREE_FAILURES):
        assert (await client.post("/chat/login", data={"password": "wrong"})).status_code == 401
    refused = await client.post("/chat/login", data={"password": PASSWORD})
    assert refused.status_code == 429, "the right password too: nothing is looked at"
    assert "Too many attempts. Try again in" in refused.text
    assert refused.headers["retry-after"] == "1"


def test_the_delay_of_an_address_doubles_up_to_a_limit(database_path: Path) -> None:
    with attempting(database_path) as attempt:
        now = datetime(2026, 1, 1, tzinfo=UTC)
        delays = []
        for _ in range(20):
            while wait := attempt("192.0.2.1", now):
                delays.append(wait.total_seconds())
                now += wait
    assert delays == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900, 900, 900, 900]


def test_refused_attempts_do_not_lengthen_the_delay(database_path: Path) -> None:
    with attempting(database_path) as attempt:
        now = datetime(2026, 1, 1, tzinfo=UTC)
        for _ in range(logins.FREE_FAILURES):
            assert not attempt("192.0.2.1", now)
        assert {attempt("192.0.2.1", now) for _ in range(100)} == {timedelta(seconds=1)}


def test_a_crowd_slows_down_addresses_that_failed_and_no_others(database_path: Path) -> None:
    with attempting(database_path) as attempt:
        now = datetime(2026, 1, 1, tzinfo=UTC)
        for number in range(250):
            assert not attempt(f"10.0.0.{number}", now)
        assert attempt("10.0.0.1", now) == logins.MAX_DELAY_OVERALL, "its second guess"
        assert not attempt("192.0.2.1", now), "the owner, from anywhere else"


def test_after_one_typo_a_crowd_delays_the_owner_by_at_most_a_minute(database_path: Path) -> None:
    with attempting(database_path) as attempt:
        typed_at = datetime(2026, 1, 1, tzinfo=UTC)
        assert not attempt("192.0.2.1", typed_at)
        for second in range(60):
            for number in range(4):
                assert not attempt(f"10.0.{second}.{number}", typed_at + timedelta(seconds=second))
        assert attempt("192.0.2.1", typed_at + timedelta(seconds=59)) == timedelta(seconds=1)
        assert not attempt("192.0.2.1", typed_at + timedelta(seconds=60))


def test_a_site_with_a_million_households_shares_one_limit(database_path: Path) -> None:
    with attempting(database_path) as attempt:
        now = datetime(2026, 1, 1, tzinfo=UTC)
        waits = [attempt(f"2001:db8:1:{number:x}::1", now) for number in range(100)]
        assert sum(not wait for wait in waits) == logins.FREE_FAILURES * logins.WIDER_FACTOR
        assert not attempt("2001:db8:2::1", now)


def test_failures_expire_after_a_day(database_path: Path) -> None:
    with attempting(database_path) as attempt:
        now = datetime(2026, 1, 1, tzinfo=UTC)
        for _ in range(logins.FREE_FAILURES):
            attempt("192.0.2.1", now)
        assert attempt("192.0.2.1", now)
        later = now + logins.FAILURES_TTL
        assert [attempt("192.0.2.1", later) for _ in range(logins.FREE_FAILURES)] == [
            timedelta()
        ] * logins.FREE_FAILURES


@contextmanager
def attempting(path: Path) -> Iterator[Callable[..., timedelta]]:
    """`attempt(address, now, host)`, each in a transaction of its own."""
    engine = write_engine(path)

    def attempt(address: str, now: datetime, host: str = "") -> timedelta:
        with engine.begin() as connection:
            return logins.reserve(connection, throttled_addresses(address), host, now).wait

    yield attempt
    engine.dispose()


@pytest.mark.slow
@pytest.mark.usefixtures("stopped_clock")
async def test_four_servers_on_one_database_allow_no_more_guesses_than_one(config: Config) -> None:
    """Each with a writer, a throttle and threads of its own, as four web processes have."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(serving(config)) for _ in range(4)]
        answers = await asyncio.gather(
            *(client.post("/chat/login", data={"password": f"guess {n}"}) for client in clients for n in range(5))
        )
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(401) == logins.FREE_FAILURES
    assert statuses.count(429) == 20 - logins.FREE_FAILURES


@pytest.mark.usefixtures("stopped_clock")
async def test_a_restart_forgets_no_failure(config: Config) -> None:
    async with serving(config) as client:
        for _ in range(logins.FREE_FAILURES + 1):
            last = await client.post("/chat/login", data={"password": "wrong"})
    assert last.status_code == 429
    async with serving(config) as client:
        assert (await client.post("/chat/login", data={"password": PASSWORD})).status_code == 429


async def test_a_correct_password_clears_earlier_failures(client: httpx.AsyncClient) -> None:
    for _ in range(3):
        for _ in range(logins.FREE_FAILURES - 1):
            assert (await client.post("/chat/login", data={"password": "wrong"})).status_code == 401
        await come_in(client)


@pytest.mark.usefixtures("stopped_clock")
async def test_the_owner_can_log_in_from_elsewhere_while_one_address_guesses(config: Config) -> None:
    async with serving(msgspec.structs.replace(config, trusted_proxies=("127.0.0.1",))) as client:

        async def attempt(address: str, password: str) -> int:
            headers = {"X-Forwarded-For": address}
            return (await client.post("/chat/login", data={"password": password}, headers=headers)).status_code

        for _ in range(20):
            last = await attempt("203.0.113.9", "wrong")
        assert last == 429
        assert await attempt("203.0.113.9", PASSWORD) == 429
        assert await attempt("198.51.100.1", PASSWORD) == 303


@pytest.mark.usefixtures("stopped_clock")
async def test_a_forwarded_address_counts_only_from_a_configured_proxy(
    config: Config, client: httpx.AsyncClient
) -> None:
    for number in range(logins.FREE_FAILURES):
        headers = {"X-Forwarded-For": f"203.0.113.{number}", "X-Forwarded-Proto": "https"}
        answer = await client.post("/chat/login", data={"password": "wrong"}, headers=headers)
        assert answer.status_code == 401
    spoofed = {"X-Forwarded-For": "198.51.100.1"}
    assert (await client.post("/chat/login", data={"password": PASSWORD}, headers=spoofed)).status_code == 429


@pytest.mark.usefixtures("stopped_clock")
async def test_of_several_forwarded_addresses_the_last_untrusted_one_counts(config: Config) -> None:
    async with serving(msgspec.structs.replace(config, trusted_proxies=("127.0.0.1", "10.0.0.0/8"))) as client:
        for number in range(logins.FREE_FAILURES + 1):
            headers = {"X-Forwarded-For": f"198.51.100.{number}, 203.0.113.9, 10.1.2.3"}
            last = await client.post("/chat/login", data={"password": "wrong"}, headers=headers)
    assert last.status_code == 429


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("192.0.2.1", ("192.0.2.1",)),
        ("::ffff:192.0.2.1", ("192.0.2.1",)),
        ("2001:db8:1:2:3:4:5:6", ("2001:db8:1:2::/64", "2001:db8:1::/48")),
        ("", ("unknown",)),
        ("x" * 100, ("x" * 48,)),
    ],
)
def test_an_ipv6_address_is_throttled_by_household_and_by_site(host: str, address: tuple[str, ...]) -> None:
    assert throttled_addresses(host) == address


async def test_logins_are_logged_without_the_password(client: httpx.AsyncClient) -> None:
    with structlog.testing.capture_logs() as lines:
        await client.post("/chat/login", data={"password": "a wrong one"})
        token = await come_in(client)
    assert [line["event"] for line in lines if "login" in line["event"]] == ["login failed", "login"]
    assert not any(secret in str(lines) for secret in ("a wrong one", PASSWORD, token))


# Headers


async def test_every_answer_has_the_security_headers_and_is_not_cached(config: Config) -> None:
    async with serving(config) as api:
        answers = [
            await api.get(path)
            for path in ("/healthz", "/api/jobs", "/api/jobs/0", "/nothing", "/chat/", "/chat/login", "/chat/jobs/rows")
        ]
        answers.append(await api.post("/api/jobs", content=b"{"))
        answers.append(await api.request("TRACE", "/chat/"))
        await log_in(api)
        answers += [
            await api.get(path)
            for path in ("/chat/", "/chat/docs", "/chat/queue/", "/chat/nothing", "/chat/queue/static/app.js")
        ]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy, answer.url
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"


async def test_static_files_may_be_cached_and_their_url_changes_with_their_content(browser: httpx.AsyncClient) -> None:
    page = (await browser.get("/chat/")).text
    assets = set(re.findall(r'(?:src|href)="(/chat/static/[^"]+)"', page))
    assert {asset.rpartition("/")[2] for asset in assets} >= {"app.css", "app.js", "icon.svg"}
    for asset in assets:
        answer = await browser.get(asset)
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert answer.headers["content-security-policy"]
        assert re.fullmatch(r"/chat/static/[0-9a-f]{12}/[\w.-]+", asset)


async def test_a_head_is_a_get_without_its_body(browser: httpx.AsyncClient) -> None:
    for path in ("/healthz", "/api/jobs", "/chat/", "/chat/login", "/chat/static/app.css", "/nothing"):
        head, got = await browser.head(path), await browser.get(path)
        assert (head.status_code, head.content) == (got.status_code, b""), path
        assert head.headers.get("content-type") == got.headers.get("content-type")


LONG = [{"Cookie": 'x="' + "\\a" * 20_000}, {"X": "x" * 50_000}, {"Authorization": "Bearer " + "x" * 40_000}]


@pytest.mark.parametrize("headers", LONG, ids=["cookie", "unknown", "token"])
async def test_headers_that_are_too_long_are_refused_unread(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    answer = await client.get("/chat/", headers=headers)
    assert answer.status_code == 431
    assert answer.json()["detail"] == "The headers are too large: at most 32 KiB together."
    assert answer.headers["content-security-policy"]


@pytest.mark.parametrize("host", ["a:b", "a:99999", "[::1]:x", "a b", "a/b", "é", "a@b", "a:", "[x]", "<script>"])
async def test_an_invalid_host_is_refused_before_it_is_used(browser: httpx.AsyncClient, host: str) -> None:
    for path in ("/chat/", "/chat/docs", "/chat/nothing", "/api/nothing"):
        answer = await browser.get(path, headers=[(b"host", host.encode())])
        assert answer.status_code == 400
        assert answer.headers["x-request-id"]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "name",
    [
        *("../app.py", "..%2f..%2fpyproject.toml", "%2e%2e/templates/base.html", "/etc/passwd", "app.css/x", "%00"),
        *("app.css%00", "x" * 300, "%ff", "APP.CSS", ".", "%2e%2e", "x/../app.py", "x/%2e%2e", "x/..%2fapp.css"),
        *("katex", "katex/", "katex/fonts", "x/katex/fonts/nothing", "x/y/z/app.css", "katex%2f"),
    ],
)
async def test_only_static_files_are_served_as_static_files(nobody: httpx.AsyncClient, name: str) -> None:
    answer = await nobody.get(f"/chat/static/{name}")
    assert answer.status_code in (303, 404)


# What a form may cost that anybody can send


@given(quoted=st.lists(st.sampled_from([b"%", b"%4", b"%41", b"%%", b"%C3%A9", b"4", b"1", b"g", b"+"])).map(b"".join))
def test_a_field_decoded_in_slices_equals_the_field_decoded_whole(quoted: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "SMALL_BYTES", 5)
        assert forms._unquote(quoted) == unquote_to_bytes(quoted.replace(b"+", b" ")).decode("utf-8", "replace")


@pytest.mark.slow
def test_decoding_a_field_of_escapes_takes_about_its_own_size_of_memory() -> None:
    quoted = b"%" * 1_000_000
    tracemalloc.start()
    try:
        assert len(forms._unquote(quoted)) == len(quoted)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 20 * len(quoted)
