"""What others put before a person's browser: pages on other ports, and a server or a session that is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import structlog
from playwright.async_api import Browser, FilePayload, Page, expect
from redis.asyncio import Redis

from llamalith_app.contracts.jobs import Progress
from llamalith_app.settings.config import Config
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import transitions
from llamalith_app.store.record import record_id
from tests.browser.conftest import PLAIN_HOST, Watched, violations, window
from tests.live import publish
from tests.settle import eventually
from tests.store.samples import register_worker
from tests.web.conftest import PASSWORD, log_in, make_config, serving


@pytest.fixture
def config(tmp_path: Path, database_path: Path, redis_url: str) -> Config:
    return make_config(tmp_path, database_path, redis_url)


@pytest.fixture
async def client(config: Config) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(config) as client:
        yield client


def origin(client: httpx.AsyncClient) -> str:
    return str(client.base_url).rstrip("/")


async def session_cookie(client: httpx.AsyncClient) -> dict[str, str]:
    await log_in(client)
    (cookie,) = client.cookies.jar
    return {"name": cookie.name, "value": cookie.value or "", "url": origin(client)}


@asynccontextmanager
async def at_home(client: httpx.AsyncClient, chromium: Browser, **options: Any) -> AsyncIterator[Watched]:
    """A watched window in the session of `client`, which is logged in by this."""
    cookie = await session_cookie(client)
    async with window(chromium, origin(client), **options) as browser:
        await browser.context.add_cookies([cookie])  # type: ignore[list-item]
        yield browser


ATTACK = """<!doctype html><title>A nice page</title>
<img src="{target}/chat/logout">
<form id="form" method="post" action="{target}/chat/jobs" target="frame">
<input name="content" value="sent by another page"></form>
<form id="text" method="post" action="{target}/api/jobs" enctype="text/plain" target="frame">
<input name='{{"content":"sent as text","x":"' value='"}}'></form>
<form id="login" method="post" action="{target}/chat/login" target="frame">
<input name="password" value="{password}"></form>
<iframe name="frame"></iframe>
<script>
const results = []
const ask = async (path, options) => {{
  try {{
    const answer = await fetch("{target}" + path, {{ credentials: "include", ...options }})
    results.push(path + " " + answer.type + " " + answer.status)
  }} catch {{ results.push(path + " refused") }}
}}
const json = JSON.stringify({{ content: "sent by fetch" }})
const attack = async () => {{
  for (const mode of ["cors", "no-cors"]) {{
    await ask("/api/jobs", {{ method: "POST", mode, body: json, headers: {{ "Content-Type": "text/plain" }} }})
    const form = {{ "Content-Type": "application/x-www-form-urlencoded" }}
    await ask("/chat/jobs", {{ method: "POST", mode, body: "content=x", headers: form }})
    await ask("/chat/logout", {{ method: "POST", mode }})
    await ask("/api/jobs", {{ mode }})
  }}
  await ask("/api/jobs", {{ method: "POST", body: json, headers: {{ "Content-Type": "application/json" }} }})
  return results
}}
</script>"""


@asynccontextmanager
async def another_site(html: str) -> AsyncIterator[str]:
    """A page on another port of this host: for cookies the same site, for everything else another origin."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = html.encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_page_on_another_port_makes_no_job_reads_nothing_and_logs_nobody_out(
    client: httpx.AsyncClient, chromium: Browser
) -> None:
    cookie = await session_cookie(client)
    html = ATTACK.format(target=origin(client), password=PASSWORD)
    async with another_site(html) as site:
        context = await chromium.new_context()
        await context.add_cookies([cookie])  # type: ignore[list-item]
        page = await context.new_page()
        with structlog.testing.capture_logs() as lines:
            await page.goto(site)
            results = await page.evaluate("attack()")
        # The session went along with the picture: it was the server that did not obey.
        assert ("/chat/logout", "session:1", 200) in {
            (line["route"], line["principal"], line["status"]) for line in lines if line["event"] == "request"
        }
        for form in ("form", "text", "login"):
            async with page.expect_response(lambda answer: answer.request.method == "POST") as answered:
                await page.evaluate("(id) => document.getElementById(id).submit()", form)
            assert (await answered.value).status == 403
        await page.goto(f"{origin(client)}/chat/")
        await expect(page.get_by_role("heading", name="What shall we write?")).to_be_visible()
        await context.close()
    assert (await client.get("/api/jobs")).json() == {"jobs": []}
    assert len(results) == 9
    assert not any(" 200" in result for result in results), json.dumps(results, indent=1)


async def test_a_link_elsewhere_to_the_logout_asks_first(client: httpx.AsyncClient, chromium: Browser) -> None:
    cookie = await session_cookie(client)
    async with another_site(f'<a href="{origin(client)}/chat/logout">prizes</a>') as site:
        context = await chromium.new_context()
        await context.add_cookies([cookie])  # type: ignore[list-item]
        page = await context.new_page()
        await page.goto(site)
        await page.get_by_role("link", name="prizes").click()
        await expect(page.get_by_role("heading", name="Log out?")).to_be_visible()
        await page.get_by_role("link", name="Stay").click()
        await expect(page.get_by_role("heading", name="What shall we write?")).to_be_visible()
        await page.goto(f"{origin(client)}/chat/logout")
        await expect(page.get_by_role("heading", name="Log in")).to_be_visible()
        await context.close()


@pytest.mark.parametrize("way", ["link", "picture", "script", "fetch"])
async def test_over_plain_http_no_site_that_hides_itself_ends_a_session(
    client: httpx.AsyncClient, chromium: Browser, way: str
) -> None:
    """Such a browser sends no Sec-Fetch headers, and no Referer where the other page wants it so."""
    await log_in(client)
    (cookie,) = client.cookies.jar
    port = client.base_url.port
    home = f"http://{PLAIN_HOST}:{port}"
    out = f"{home}/chat/logout"
    html = {
        "link": f'<a href="{out}">prizes</a>',
        "picture": f'<img src="{out}">',
        "script": f'<script src="{out}"></script>',
        "fetch": f'<script>fetch("{out}", {{ mode: "no-cors", credentials: "include" }})</script>',
    }[way]
    async with another_site(f'<meta name="referrer" content="no-referrer">{html}') as site:
        context = await chromium.new_context()
        await context.add_cookies([{"name": cookie.name, "value": cookie.value or "", "url": home}])
        page = await context.new_page()
        # Of the same site, so that the session goes along with a picture too.
        with structlog.testing.capture_logs() as lines:
            async with page.expect_request(out):
                await page.goto(f"http://{PLAIN_HOST}:{site.rpartition(':')[2]}/")
                if way == "link":
                    await page.get_by_role("link", name="prizes").click()

            async def answered() -> bool:
                return any(line.get("route") == "/chat/logout" for line in lines)

            await eventually(answered)
        # The session went along: it was the server that did not obey.
        assert ("/chat/logout", "session:1", 200) in {
            (line["route"], line["principal"], line["status"]) for line in lines if line["event"] == "request"
        }
        if way == "link":
            await expect(page.get_by_role("heading", name="Log out?")).to_be_visible()
        await page.goto(f"{home}/chat/")
        await expect(page.get_by_role("heading", name="What shall we write?")).to_be_visible()
        await page.get_by_role("button", name="Log out").click()
        await expect(page.get_by_role("heading", name="Log in")).to_be_visible()
        await context.close()


async def test_a_page_s_title_and_heading_show_an_id_that_would_turn_them_as_it_is(
    client: httpx.AsyncClient, chromium: Browser
) -> None:
    disguised = "invoice-\u202egpj.exe"
    async with at_home(client, chromium) as browser:
        assert (await client.post("/api/jobs", json={"content": "x", "conversation_id": disguised})).status_code == 200
        page = await browser.page(f"/chat/conversations/{quote(disguised)}")
        await expect(page).to_have_title("x · Llamalith")
        await page.get_by_role("button", name="Settings").click()
        await expect(page.get_by_text("Conversation invoice-⟨U+202E⟩gpj.exe")).to_be_visible()
        await page.keyboard.press("Escape")
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            assert await violations(page) == []
        # What JavaScript shows of a refusal, too.
        await page.route("**/remove", lambda route: route.fulfill(status=409, json={"detail": f"No {disguised}"}))
        await page.get_by_role("button", name="Remove").click()
        await expect(page.get_by_role("alert")).to_contain_text("No invoice-⟨U+202E⟩gpj.exe")


async def test_no_page_can_be_framed(client: httpx.AsyncClient, chromium: Browser) -> None:
    async with another_site(f'<iframe src="{origin(client)}/chat/login"></iframe>') as site:
        context = await chromium.new_context()
        page = await context.new_page()
        console_texts: list[str] = []
        page.on("console", lambda message: console_texts.append(message.text))
        await page.goto(site)

        async def refused() -> bool:
            return any("frame-ancestors" in text or "X-Frame-Options" in text for text in console_texts)

        await eventually(refused)
        await context.close()


@pytest.mark.slow
async def test_an_open_page_says_that_its_session_has_ended_and_keeps_what_was_typed(
    client: httpx.AsyncClient, chromium: Browser
) -> None:
    async with at_home(client, chromium) as browser:
        await client.post("/api/jobs", json={"content": "first", "conversation_id": "c"})
        page = await browser.page("/chat/conversations/c")
        await page.get_by_label("Message").fill("typed for an hour")
        await client.get("/chat/logout")
        await expect(page.locator("#trouble")).to_contain_text("Your session has ended.", timeout=10_000)
        await page.get_by_role("button", name="Send").click()
        await expect(page.get_by_text("typed for an hour")).to_be_visible()
        await page.get_by_label("Password").fill(PASSWORD)
        await page.get_by_role("button", name="Log in").click()
        await expect(page.get_by_label("Message")).to_have_value("typed for an hour")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#job-2")).to_contain_text("typed for an hour")


@pytest.mark.slow
async def test_what_was_typed_and_is_too_long_for_a_login_is_back_in_its_form_after_it(
    client: httpx.AsyncClient, chromium: Browser
) -> None:
    text = "typed for an hour " * 2000
    async with at_home(client, chromium) as browser:
        page = await browser.page("/chat/")
        await page.get_by_label("Message").fill(text)
        await browser.context.clear_cookies()
        await page.get_by_role("button", name="Send").click()
        await expect(page.get_by_text("Your browser keeps it")).to_be_visible()
        await page.get_by_label("Password").fill(PASSWORD)
        await page.get_by_role("button", name="Log in").click()
        await expect(page.get_by_label("Message")).to_have_value(text)
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#job-1")).to_contain_text("typed for an hour")


@pytest.mark.slow
async def test_from_an_open_page_one_logs_in_beside_it_and_goes_on_where_one_was(
    client: httpx.AsyncClient, chromium: Browser
) -> None:
    async with at_home(client, chromium) as browser:
        await client.post("/api/jobs", json={"content": "first", "conversation_id": "c"})
        page = await browser.page("/chat/conversations/c")
        await page.get_by_label("Message").fill("typed for an hour")
        await client.get("/chat/logout")
        async with browser.context.expect_page() as opened:
            await page.get_by_role("link", name="Log in (new tab)").click(timeout=10_000)
        login = await opened.value
        await login.get_by_label("Password").fill(PASSWORD)
        await login.get_by_role("button", name="Log in").click()
        await expect(login.get_by_role("heading", name="What shall we write?")).to_be_visible()
        await login.close()
        await page.bring_to_front()
        await expect(page.get_by_label("Message")).to_have_value("typed for an hour")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#job-2")).to_contain_text("typed for an hour")


async def test_keys_that_are_held_down_send_a_form_once(client: httpx.AsyncClient, chromium: Browser) -> None:
    async with at_home(client, chromium) as browser:
        page = await browser.page("/chat/")
        await page.get_by_label("Message").fill("once")
        await page.keyboard.down("Control")
        for _ in range(5):
            await page.keyboard.down("Enter")
        await page.keyboard.up("Enter")
        await page.keyboard.up("Control")
        await expect(page.locator("#job-1")).to_contain_text("once")
    assert len((await client.get("/api/jobs")).json()["jobs"]) == 1


async def test_a_double_click_a_way_back_and_a_second_tab_make_no_second_job_and_lose_no_draft(
    client: httpx.AsyncClient, chromium: Browser
) -> None:
    async with at_home(client, chromium) as browser:
        page = await browser.page("/chat/")
        message = page.get_by_label("Message", exact=True)
        await message.fill("sent by a double click")
        await page.get_by_role("button", name="Send", exact=True).dblclick()
        await expect(page.locator("#job-1 .you .text")).to_have_text("sent by a double click")
        await message.fill("half a thought")
        conversation = page.url.partition("#")[0]
        await page.go_back()
        await expect(page.get_by_role("heading", name="What shall we write?")).to_be_visible()
        await expect(message).to_have_value("")
        await page.go_forward()
        await expect(message).to_have_value("half a thought")

        other = await browser.context.new_page()
        await other.goto(conversation)
        # What is typed in one tab is no draft of another.
        await expect(other.get_by_label("Message", exact=True)).to_have_value("")
        await other.get_by_label("Message", exact=True).fill("from the second tab")
        await other.get_by_role("button", name="Send", exact=True).dblclick()
        await expect(other.locator("#job-2 .you .text")).to_have_text("from the second tab")
        await page.bring_to_front()
        await expect(page.locator("#job-2 .you .text")).to_have_text("from the second tab", timeout=10_000)
        await expect(message).to_have_value("half a thought")
        await page.get_by_role("button", name="Send", exact=True).click()
        await expect(page.locator("#job-3 .you .text")).to_have_text("half a thought")
    listed = (await client.get("/api/jobs")).json()["jobs"]
    assert [job["user_input"] for job in listed] == ["half a thought", "from the second tab", "sent by a double click"]
    assert len({job["conversation_id"] for job in listed}) == 1


async def test_a_file_that_cannot_be_used_leaves_the_page_with_the_reason_and_stores_nothing(
    client: httpx.AsyncClient, chromium: Browser
) -> None:
    huge = b"x" * 20_000_000
    async with at_home(client, chromium) as browser:
        page = await browser.page("/chat/")
        message = page.get_by_label("Message", exact=True)
        await message.fill("what was typed")
        log, scan = (FilePayload(name=name, mimeType="", buffer=huge) for name in ("log.txt", "scan.pdf"))
        await page.locator("[data-files]").set_input_files([log, scan])
        trouble = page.get_by_role("alert")
        await expect(trouble).to_contain_text("log.txt was not attached: it has 20.0 MB, at most 400 kB can be.")
        await expect(trouble).to_contain_text("scan.pdf was not attached: it has 20.0 MB, at most 16.0 MB can be.")
        await expect(page.locator(".attached li")).to_have_count(0)
        await expect(message).to_have_value("what was typed")

        await page.goto(f"{browser.base}/chat/conversations")
        for content, reason in (
            (b'{"format": "llama', "Nothing was imported. The file is no JSON"),
            (b"[" * 100_000, "Nothing was imported. The file is wrong: expected an object, got a list"),
            (b'{"format": "llamalith-conversation-1", "turns": [], "x": 1}', "Nothing was imported. turns: expected"),
            (b"GIF89a\x00\xff", "Nothing was imported. The file is no JSON"),
            (huge, "The file has 20.0 MB, at most 16.0 MB can be imported."),
        ):
            picker = page.get_by_label("Import a conversation (JSON)")
            await picker.set_input_files({"name": "a.json", "mimeType": "application/json", "buffer": content})
            if content != huge:
                await page.get_by_role("button", name="Import", exact=True).click()
            await expect(page.get_by_role("alert").filter(visible=True).last).to_contain_text(reason)
            await expect(page.get_by_role("heading", name="Chats", exact=True)).to_be_visible()
            await expect(picker).to_have_value("")
        assert await violations(page) == []
    assert (await client.get("/api/conversations")).json()["conversations"] == []


async def test_while_a_job_runs_selection_and_focus_in_its_turn_stay(
    config: Config, client: httpx.AsyncClient, chromium: Browser, database: Database, redis_url: str
) -> None:
    fields = {"content": "select me", "system_prompt": "Be kind.", "conversation_id": "c"}
    await client.post("/api/jobs", json=fields)
    worker = await database.write(register_worker)
    claim = await database.write(transitions.claim, "smollm2", 1, worker, datetime.now(UTC))
    assert claim is not None
    async with at_home(client, chromium) as browser, Redis.from_url(redis_url) as redis:
        page = await browser.page("/chat/conversations/c")
        summary = page.locator("#job-1 summary", has_text="System prompt")
        await summary.focus()
        await page.locator("#job-1 .said.you .text").evaluate("(text) => getSelection().selectAllChildren(text)")
        for count in (7, 8):
            progress = Progress(phase="decode", completion_tokens=count)
            await publish(redis, record_id(database.path), 1, claim.attempt, progress)
            await expect(page.locator("#job-1 .state")).to_contain_text(f"Writing: {count} tokens")
        await expect(summary).to_be_focused()
        assert await page.evaluate("getSelection().toString()") == "select me"


async def send_in_vain(browser: Watched, page: Page, button: str) -> None:
    """Presses the button while the server is away."""
    await browser.context.set_offline(True)
    async with page.expect_event("requestfailed", lambda request: request.method == "POST"):
        await page.get_by_role("button", name=button).click()
    await browser.context.set_offline(False)


async def test_what_was_sent_to_a_server_that_is_away_is_typed_still_and_makes_one_job(
    client: httpx.AsyncClient, chromium: Browser
) -> None:
    await client.post("/api/jobs", json={"content": "first", "conversation_id": "c"})
    async with at_home(client, chromium) as browser:
        page = await browser.page("/chat/conversations/c")
        message = page.get_by_label("Message")
        await message.fill("typed for ten minutes")
        await send_in_vain(browser, page, "Send")
        await expect(page.locator("#trouble")).to_contain_text("Not sent: there is no connection")
        await expect(message).to_have_value("typed for ten minutes")
        await page.goto(f"{browser.base}/chat/conversations/c")
        await expect(message).to_have_value("typed for ten minutes")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#job-2")).to_contain_text("typed for ten minutes")
        await expect(message).to_have_value("")
        # What was taken does not come again, neither by a way back nor by another visit.
        await page.goto(f"{browser.base}/chat/")
        await page.go_back()
        await expect(message).to_have_value("")
        await page.goto(f"{browser.base}/chat/")
        await page.goto(f"{browser.base}/chat/conversations/c")
        await expect(message).to_have_value("")
    listed = (await client.get("/api/jobs")).json()["jobs"]
    assert [job["user_input"] for job in listed] == ["typed for ten minutes", "first"]


async def test_what_was_not_delivered_is_typed_still_after_a_look_at_other_jobs(
    client: httpx.AsyncClient, chromium: Browser
) -> None:
    await client.post("/api/jobs", json={"content": "first", "conversation_id": "c"})
    async with at_home(client, chromium) as browser:
        page = await browser.page("/chat/")
        message = page.get_by_label("Message")
        await message.fill("typed for ten minutes")
        await send_in_vain(browser, page, "Send")
        await page.goto(f"{browser.base}/chat/conversations/c")
        await page.get_by_role("link", name="New chat").click()
        await expect(message).to_have_value("typed for ten minutes")


async def test_what_was_typed_is_gone_from_the_browser_after_a_logout(
    client: httpx.AsyncClient, chromium: Browser
) -> None:
    async with at_home(client, chromium) as browser:
        page = await browser.page("/chat/")
        await page.get_by_label("Message").fill("a secret")
        await page.reload()
        await expect(page.get_by_label("Message")).to_have_value("a secret")
        await page.get_by_role("button", name="Log out").click()
        await expect(page.get_by_label("Password")).to_be_visible()
        assert await page.evaluate("Object.keys(sessionStorage).length") == 0


async def test_why_a_cancel_was_not_done_stays_while_the_server_is_away_until_it_is_closed(
    client: httpx.AsyncClient, chromium: Browser
) -> None:
    await client.post("/api/jobs", json={"content": "waits", "conversation_id": "c"})
    async with at_home(client, chromium) as browser:
        page = await browser.page("/chat/conversations/c")
        cancel = page.get_by_role("button", name="Remove")
        await browser.context.set_offline(True)
        async with page.expect_event("requestfailed", lambda request: "turns" in request.url):
            await cancel.click()
        await expect(page.locator("#trouble")).to_contain_text("That was not done")
        await expect(cancel).to_be_focused()
        await page.locator("#trouble").get_by_role("button", name="Close").click()
        await expect(page.locator("#trouble")).not_to_contain_text("That was not done")
        await browser.context.set_offline(False)
        # The button works at once, with no time to wait for.
        await cancel.click()
        await expect(page.locator("#job-1")).to_have_count(0)


async def test_the_list_of_conversations_keeps_itself_fresh(
    client: httpx.AsyncClient, chromium: Browser, database: Database
) -> None:
    await client.post("/api/jobs", json={"content": "first", "conversation_id": "c"})
    async with at_home(client, chromium) as browser:
        page = await browser.page("/chat/conversations")
        await expect(page.locator('[id="conversation-c"] .badge')).to_have_text("Queued")
        await client.post("/api/jobs", json={"content": "second", "conversation_id": "a b"})
        await expect(page.locator("#conversations > li")).to_have_count(2, timeout=10_000)
        await expect(page.locator("#conversations > li:not(.day)").first).to_contain_text("second")
        await client.post("/api/jobs/1/cancel")
        await expect(page.locator('[id="conversation-c"] .badge')).to_have_count(0, timeout=10_000)
        assert await violations(page) == []


async def test_a_list_that_the_server_refuses_says_with_what(client: httpx.AsyncClient, chromium: Browser) -> None:
    async with at_home(client, chromium) as browser:
        page = await browser.page("/chat/jobs")
        await page.route("**/jobs/rows**", lambda route: route.fulfill(status=503))
        await expect(page.locator("#trouble")).to_contain_text("cannot show this just now (503)", timeout=10_000)


@pytest.mark.slow
async def test_an_open_page_says_that_the_server_is_away_and_goes_on_when_it_is_back(
    client: httpx.AsyncClient, chromium: Browser
) -> None:
    async with at_home(client, chromium) as browser:
        page = await browser.page("/chat/jobs")
        await browser.context.set_offline(True)
        await expect(page.locator("#trouble")).to_contain_text("No connection", timeout=10_000)
        await client.post("/api/jobs", json={"content": "queued meanwhile"})
        await browser.context.set_offline(False)
        await expect(page.locator("#job-1")).to_contain_text("queued meanwhile", timeout=10_000)
        await expect(page.locator("#trouble")).to_be_hidden()


@pytest.mark.slow
async def test_where_the_server_is_away_a_page_says_so_and_the_browser_keeps_nothing_private(
    client: httpx.AsyncClient, chromium: Browser
) -> None:
    await client.post("/api/jobs", json={"content": "a secret", "conversation_id": "c"})
    async with at_home(client, chromium, service_workers="allow") as browser:
        page = await browser.page("/chat/conversations/c")
        await page.evaluate("navigator.serviceWorker.ready.then(() => true)")
        # The worker rules over pages that are opened from now on.
        await page.goto(f"{browser.base}/chat/jobs")
        await browser.context.set_offline(True)
        await page.goto(f"{browser.base}/chat/conversations/c")
        await expect(page.get_by_role("heading", name="No connection to Llamalith")).to_be_visible()
        assert await violations(page) == []
        kept = """async () => {
            const texts = []
            for (const name of await caches.keys()) {
                const cache = await caches.open(name)
                for (const request of await cache.keys()) texts.push(await (await cache.match(request)).text())
            }
            return texts.join()
        }"""
        assert "a secret" not in await page.evaluate(kept)
        await browser.context.set_offline(False)
        await page.get_by_role("link", name="Try again").click()
        await expect(page.locator("#job-1 .you .text")).to_have_text("a secret")
