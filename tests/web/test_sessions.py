"""Browser sessions over http and https: what ends them, their cookies, and what is logged."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest
import structlog

from llamalith_app.guards.sessions import COOKIE
from llamalith_app.settings.config import Config
from llamalith_app.web.html import ASSETS, VERSION
from tests.web.conftest import PASSWORD, serving

HTTPS = {"X-Forwarded-Proto": "https"}
SECURE_COOKIE = f"__Host-{COOKIE}"
FIREFOX = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"}
PAGE = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
PICTURE = {"Accept": "image/avif,image/webp,image/png,image/svg+xml,image/*;q=0.8,*/*;q=0.5"}


@pytest.fixture
async def client(config: Config) -> AsyncIterator[httpx.AsyncClient]:
    """Nobody yet, behind a proxy that ends TLS where a request says so."""
    async with serving(msgspec.structs.replace(config, trusted_proxies=("127.0.0.1",), hsts="31536000")) as client:
        del client.headers["Authorization"]
        yield client


async def come_in(client: httpx.AsyncClient, **headers: str) -> dict[str, str]:
    """The cookies of a new session."""
    answer = await client.post("/chat/login", data={"password": PASSWORD}, headers=headers)
    assert answer.status_code == 303
    client.cookies.clear()
    (pair,) = [line.partition(";")[0] for line in answer.headers.get_list("set-cookie") if COOKIE in line]
    return {"Cookie": pair}


async def opens(client: httpx.AsyncClient, cookie: dict[str, str], **headers: str) -> bool:
    client.cookies.clear()
    return (await client.get("/api/jobs", headers=cookie | headers)).status_code == 200


# What ends one


@pytest.mark.parametrize("accept", [PAGE, PICTURE, {"Accept": "*/*"}], ids=["page", "picture", "anything"])
async def test_a_browser_without_any_origin_header_is_asked_before_a_logout(
    client: httpx.AsyncClient, accept: dict[str, str]
) -> None:
    cookie = await come_in(client)
    asked = await client.get("/chat/logout", headers=cookie | FIREFOX | accept)
    assert "Log out?" in asked.text
    assert "clear-site-data" not in asked.headers
    assert await opens(client, cookie)


@pytest.mark.parametrize("accept", ["text/html", "image/png"])
async def test_a_request_for_html_or_an_image_counts_as_a_browser_s(client: httpx.AsyncClient, accept: str) -> None:
    cookie = await come_in(client)
    assert (await client.get("/chat/logout", headers=cookie | {"Accept": accept})).status_code == 200
    assert await opens(client, cookie)


@pytest.mark.parametrize(
    "sent_headers", [{"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}, {"Referer": "/chat/"}], ids=str
)
async def test_a_browser_sent_by_our_page_or_by_its_user_is_logged_out(
    client: httpx.AsyncClient, sent_headers: dict[str, str]
) -> None:
    cookie = await come_in(client)
    if "Referer" in sent_headers:
        sent_headers = {"Referer": f"{client.base_url}{sent_headers['Referer']}".replace("//chat", "/chat")}
    answer = await client.get("/chat/logout", headers=cookie | FIREFOX | PAGE | sent_headers)
    assert (answer.status_code, answer.headers["location"]) == (303, "/chat/login")
    assert not await opens(client, cookie)


@pytest.mark.parametrize("accept", ["*/*", "application/json, text/plain, */*"])
async def test_a_program_ends_its_session_by_a_plain_get(client: httpx.AsyncClient, accept: str) -> None:
    cookie = await come_in(client)
    program = {"User-Agent": "curl/8.14.1", "Accept": accept}
    assert (await client.get("/chat/logout", headers=cookie | program)).status_code == 303
    assert not await opens(client, cookie)


@pytest.mark.parametrize("sent_headers", [{}, PAGE, {"Sec-Fetch-Site": "same-origin"}], ids=str)
async def test_a_head_ends_no_session(client: httpx.AsyncClient, sent_headers: dict[str, str]) -> None:
    cookie = await come_in(client)
    answer = await client.head("/chat/logout", headers=cookie | sent_headers)
    assert "set-cookie" not in answer.headers
    assert await opens(client, cookie)


async def test_a_logout_over_https_clears_the_browser_s_storage_and_one_without_a_session_clears_nothing(
    client: httpx.AsyncClient,
) -> None:
    for headers, cleared in (({}, None), (HTTPS, '"cache", "storage"')):
        cookie = await come_in(client, **headers)
        host = str(client.base_url).partition("//")[2].rstrip("/")
        origin = {"Origin": f"{'https' if headers else 'http'}://{host}"}
        out = await client.post("/chat/logout", headers=cookie | headers | origin)
        assert (out.status_code, out.headers.get("clear-site-data")) == (303, cleared)
        assert not await opens(client, cookie, **headers)
        # What was typed before a session ended is kept over the login, and no link elsewhere takes it away.
        assert "clear-site-data" not in (await client.get("/chat/logout", headers=cookie | headers | PAGE)).headers


# Its cookie


async def test_over_https_every_cookie_has_the_host_prefix(client: httpx.AsyncClient) -> None:
    login = await client.post("/chat/login", data={"password": PASSWORD}, headers=HTTPS)
    session = login.headers["set-cookie"].partition(";")[0]
    led = await client.get("/chat/jobs", headers=HTTPS)
    made = await client.post(
        "/chat/jobs",
        data={"content": "x", "model": "smollm2", "once": "o"},
        headers={**HTTPS, "Cookie": session, "Sec-Fetch-Site": "same-origin"},
    )
    out = await client.get("/chat/logout", headers={**HTTPS, "Cookie": session, "Sec-Fetch-Site": "same-origin"})
    answers = (login, led, made, out)
    names = []
    for answer in answers:
        (line,) = answer.headers.get_list("set-cookie")
        pair, *flags = line.split("; ")
        names.append(pair.partition("=")[0])
        assert {"Secure", "Path=/"} <= set(flags), line
        assert "Domain" not in line
    assert names == [SECURE_COOKIE, "__Host-llamalith_next", "__Host-llamalith_taken", SECURE_COOKIE]


async def test_a_login_over_https_leads_on_to_the_page_that_was_asked_for(client: httpx.AsyncClient) -> None:
    led = await client.get("/chat/jobs?status=done", headers=HTTPS | PAGE)
    cookie = {"Cookie": led.headers["set-cookie"].partition(";")[0]}
    shown = await client.get("/chat/login", headers=HTTPS | cookie)
    assert 'name="next" value="/chat/jobs?status=done"' in shown.text


async def test_a_session_of_http_is_invalid_over_https_and_the_other_way_round(client: httpx.AsyncClient) -> None:
    plain, secure = await come_in(client), await come_in(client, **HTTPS)
    assert plain["Cookie"].startswith(f"{COOKIE}=")
    assert secure["Cookie"].startswith(f"{SECURE_COOKIE}=")
    assert await opens(client, plain)
    assert await opens(client, secure, **HTTPS)
    assert not await opens(client, plain, **HTTPS)
    assert not await opens(client, secure)
    both = {"Cookie": f"{secure['Cookie']}; {plain['Cookie']}"}
    assert (await client.get("/chat/logout", headers=both | HTTPS)).status_code == 303
    assert not await opens(client, secure, **HTTPS)
    assert await opens(client, plain)


@pytest.mark.parametrize(("began", "sent"), [({}, HTTPS), (HTTPS, {})], ids=["http to https", "https to http"])
async def test_a_token_of_one_scheme_opens_and_ends_nothing_over_the_other_under_the_other_s_name(
    client: httpx.AsyncClient, began: dict[str, str], sent: dict[str, str]
) -> None:
    cookie = await come_in(client, **began)
    token = cookie["Cookie"].partition("=")[2]
    renamed = {"Cookie": f"{SECURE_COOKIE if sent else COOKIE}={token}"}
    assert not await opens(client, renamed, **sent)
    page = await client.get("/chat/jobs", headers=renamed | sent)
    assert (page.status_code, page.headers["location"]) == (303, "/chat/login")
    await client.get("/chat/logout", headers=renamed | sent)
    assert await opens(client, cookie, **began)


# What comes with answers


async def test_hsts_is_sent_over_https_only_and_if_configured(client: httpx.AsyncClient, config: Config) -> None:
    for path in ("/healthz", "/chat/login", "/api/nothing", "/chat/static/app.css"):
        answer = await client.get(path, headers=HTTPS)
        assert answer.headers["strict-transport-security"] == "max-age=31536000"
        assert "strict-transport-security" not in (await client.get(path)).headers
    async with serving(msgspec.structs.replace(config, trusted_proxies=("127.0.0.1",))) as other:
        assert "strict-transport-security" not in (await other.get("/healthz", headers=HTTPS)).headers


@pytest.mark.slow
@pytest.mark.parametrize("version", ["", "000000000000/", "{version}x/", "{version}%20/"])
async def test_a_static_file_under_another_version_s_url_is_not_cached(client: httpx.AsyncClient, version: str) -> None:
    for name, content in ASSETS.items():
        kept = await client.get(f"/chat/static/{VERSION}/{name}")
        assert kept.headers["cache-control"] == "public, max-age=31536000, immutable"
        answer = await client.get(f"/chat/static/{version.format(version=VERSION)}{name}")
        assert (answer.status_code, answer.content) == (200, content)
        assert answer.headers["cache-control"] == "no-cache"


# The log


async def test_polled_requests_that_succeed_are_logged_at_debug(
    client: httpx.AsyncClient,
) -> None:
    cookie = await come_in(client)
    paths = (
        *("/healthz", "/chat/jobs/rows", "/chat/conversation/list", "/chat/queue/api/queues"),
        *("/chat/static/app.css", "/chat/jobs", "/api/jobs", "/chat/static/nothing", "/chat/conversation/turns?id=no"),
    )
    with structlog.testing.capture_logs() as lines:
        for path in paths:
            await client.get(path, headers=cookie)
        await client.get("/readyz")
    assert [(line["log_level"], line["status"] < 400) for line in lines if line["event"] == "request"] == [
        *[("debug", True)] * 5,
        *[("info", True)] * 2,
        *[("info", False)] * 2,
        ("info", False),
    ]


async def test_a_refused_request_is_logged_with_the_client_s_address_and_the_reason(client: httpx.AsyncClient) -> None:
    far = {"X-Forwarded-For": "203.0.113.9"}
    cookie = await come_in(client)
    secret = "a-wrong-token"
    with structlog.testing.capture_logs() as lines:
        await client.get(f"/api/jobs?token={secret}", headers={**far, "Authorization": f"Bearer {secret}"})
        await client.post("/chat/logout", headers={**far, **cookie, "Sec-Fetch-Site": "cross-site"})
        await client.post("/api/jobs", content=b"{", headers={**far, **cookie, "Sec-Fetch-Site": "same-origin"})
        await client.get(f"/chat/{secret}", headers=far | PAGE)
        await client.get("/chat/", headers={"X": "x" * 40_000, **far})
        await client.get("/api/jobs", headers=cookie | far)
    logged = [(line["status"], line.get("address"), line.get("why")) for line in lines if line["event"] == "request"]
    assert logged == [
        (401, "203.0.113.9", "not-authenticated"),
        (403, "203.0.113.9", "cross-site"),
        (415, "203.0.113.9", "unsupported-media-type"),
        (404, "203.0.113.9", "not-found"),
        (431, "203.0.113.9", "none"),
        (200, None, None),
    ]
    assert secret not in str(lines)


async def test_a_logout_is_logged_with_its_address_and_without_its_token(client: httpx.AsyncClient) -> None:
    cookie = await come_in(client)
    with structlog.testing.capture_logs() as lines:
        await client.get("/chat/logout", headers=cookie | {"X-Forwarded-For": "203.0.113.9"})
    assert [line["address"] for line in lines if line["event"] == "logout"] == ["203.0.113.9"]
    assert cookie["Cookie"].partition("=")[2] not in str(lines)
