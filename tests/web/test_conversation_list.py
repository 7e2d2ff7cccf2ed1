"""Conversations as a whole, by API and by page: found, renamed, pinned, archived, tagged, deleted and restored."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, tzinfo
from html import unescape
from typing import Any
from zoneinfo import ZoneInfo

import httpx
import pytest
from sqlalchemy import update

from llamalith_app.controllers.pages.conversations import CONVERSATIONS_ON_PAGE
from llamalith_app.settings.config import Config
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import transitions
from llamalith_app.store.tables import JobRow
from tests.store.samples import finish, register_worker
from tests.web.conftest import ROUTES, log_in, serving

MODEL = {"model": "smollm2"}


async def queue(client: httpx.AsyncClient, public_id: str, content: str = "hello") -> int:
    answer = await client.post("/api/jobs", json={"content": content, "conversation_id": public_id})
    assert answer.status_code == 200
    return int(answer.json()["job_id"])


async def answer(database: Database, reply: str) -> None:
    worker = await database.write(register_worker)
    claimed = await database.write(transitions.claim, "smollm2", 1, worker, datetime.now(UTC))
    assert claimed is not None
    await database.write(finish, claimed, reply)


async def ids(client: httpx.AsyncClient, **query: Any) -> list[str]:
    found = await client.get("/api/conversations", params=query)
    assert found.status_code == 200, found.text
    return [one["conversation_id"] for one in found.json()["conversations"]]


async def test_a_list_says_what_a_person_needs_to_choose_a_conversation(
    api: httpx.AsyncClient, database: Database
) -> None:
    await queue(api, "a", "What is a queue?")
    await answer(database, "It is\na line of   people — Café.")
    await api.post("/api/submit", json={"user_input": "by the older way", "session_id": "b"})
    changed = await api.patch("/api/conversations/a", json={"title": " Queues ", "pinned": True, "tags": [" x ", "b"]})
    assert changed.status_code == 200
    found = (await api.get("/api/conversations", params={"q": "cafe people"})).json()
    (one,) = found["conversations"]
    assert datetime.fromisoformat(one.pop("last_at")) <= datetime.now(UTC)
    assert one == {
        "conversation_id": "a",
        "title": "Queues",
        "first_prompt": "What is a queue?",
        "tags": ["b", "x"],
        "pinned": True,
        "archived": False,
        "source": "api",
        "n_turns": 1,
        "status": "done",
        "found": {"text": "It is a line of people — Café.", "marks": [[16, 22], [25, 29]]},
    }
    assert found["next"] is None
    assert await ids(api, source="legacy") == ["b"]
    assert await ids(api, tag="x") == ["a"]
    assert (await ids(api, status="queued"), await ids(api, status="error")) == (["b"], [])
    (by_title,) = (await api.get("/api/conversations", params={"q": "queues"})).json()["conversations"]
    assert by_title["found"] is None, "it stands in the title alone"
    read = await api.get("/api/conversations/b")
    assert (read.json()["source"], read.json()["first_prompt"]) == ("legacy", "by the older way")
    cleared = await api.patch("/api/conversations/a", json={"title": None, "pinned": False, "archived": True})
    assert (cleared.json()["title"], cleared.json()["archived"]) == (None, True)
    assert await ids(api) == ["b"]
    assert await ids(api, archived="true") == ["a"]
    assert await ids(api, archived="any") == ["b", "a"]


async def test_pages_of_a_list_have_each_conversation_once(api: httpx.AsyncClient) -> None:
    for number in range(5):
        await queue(api, f"c{number}")
    page = (await api.get("/api/conversations", params={"limit": 2})).json()
    seen = [one["conversation_id"] for one in page["conversations"]]
    while page["next"] is not None:
        page = (await api.get("/api/conversations", params={"limit": 2, "before": page["next"]})).json()
        seen += [one["conversation_id"] for one in page["conversations"]]
    assert seen == ["c4", "c3", "c2", "c1", "c0"]


async def test_a_deleted_conversation_answers_404_until_it_is_restored(
    api: httpx.AsyncClient, database: Database
) -> None:
    done = await queue(api, "a/b")
    await answer(database, "a reply")
    open_job = await queue(api, "a/b")
    deleted = await api.delete("/api/conversations/a%2Fb")
    assert deleted.json() == {"ok": True, "changed": ["a/b"], "cancelled": 1}
    for method, path in (
        ("GET", "/api/conversations/a%2Fb"),
        ("GET", "/api/conversations/a%2Fb/events"),
        ("POST", "/api/conversations/a%2Fb/cancel"),
        ("DELETE", "/api/conversations/a%2Fb"),
        ("GET", f"/api/jobs/{done}"),
        ("GET", f"/api/jobs/{done}/events"),
        ("GET", f"/api/jobs/{done}/attempts"),
        ("POST", f"/api/jobs/{open_job}/retry"),
        ("POST", f"/api/jobs/{open_job}/cancel"),
    ):
        assert (await api.request(method, path)).status_code == 404, (method, path)
    assert (await api.patch("/api/conversations/a%2Fb", json={"title": "x"})).status_code == 404
    assert (await api.get("/api/conversations/a%2Fb/messages")).json()["exists"] is False
    assert (await api.get("/api/conversations/a%2Fb/latest")).json()["exists"] is False
    assert (await api.get("/api/jobs")).json()["jobs"] == []
    assert await ids(api) == []
    restored = await api.post("/api/conversations/a%2Fb/restore")
    assert (restored.status_code, restored.json()["status"], restored.json()["n_turns"]) == (200, "cancelled", 2)
    assert (await api.post("/api/conversations/a%2Fb/restore")).status_code == 200
    assert (await api.get(f"/api/jobs/{open_job}")).json()["status"] == "cancelled"
    assert (await api.post(f"/api/jobs/{open_job}/retry")).status_code == 200
    assert (await api.post("/api/conversations/nothing/restore")).status_code == 404


async def test_whoever_follows_a_job_learns_that_its_conversation_was_deleted(api: httpx.AsyncClient) -> None:
    job_id = await queue(api, "a")
    async with api.stream("GET", f"/api/jobs/{job_id}/events") as stream:
        lines = stream.aiter_lines()
        assert [line async for line in _until(lines, "event: progress")]
        await api.delete("/api/conversations/a")
        assert [line async for line in _until(lines, "event: cancelled")]


async def _until(lines: Any, wanted: str) -> Any:
    async for line in lines:
        yield line
        if line == wanted:
            return
    raise AssertionError(f"the stream ended before {wanted}")


async def test_a_prompt_to_a_deleted_conversation_begins_another_one(api: httpx.AsyncClient) -> None:
    await queue(api, "a", "old")
    await api.delete("/api/conversations/a")
    assert (await api.post("/api/conversations/a/reply", json={"content": "new"})).status_code == 200
    messages = (await api.get("/api/conversations/a/messages")).json()["messages"]
    assert [message["content"] for message in messages] == ["new"]
    refused = await api.post("/api/conversations/a/restore")
    assert (refused.status_code, refused.json()["type"]) == (409, "about:llamalith/conversation-exists")


async def test_many_are_changed_at_once(api: httpx.AsyncClient) -> None:
    for name in "abc":
        await queue(api, name)

    async def change(**fields: Any) -> dict[str, Any]:
        answer = await api.patch("/api/conversations", json={"conversation_ids": ["a", "b", "unknown"], **fields})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    assert await change(add_tags=["x"], archived=True) == {"ok": True, "changed": ["a", "b"], "cancelled": 0}
    assert await ids(api, archived="true", tag="x") == ["b", "a"]
    assert (await change(deleted=True))["cancelled"] == 2
    assert await ids(api, archived="any") == ["c"]
    assert (await change(deleted=False, archived=False, remove_tags=["x"]))["changed"] == ["a", "b"]
    assert await ids(api) == ["c", "b", "a"]
    assert await ids(api, tag="x") == []


@pytest.mark.parametrize(
    ("method", "path", "body", "detail"),
    [
        ("PATCH", "/api/conversations/a", {}, "Nothing is to change: send at least one of title"),
        ("PATCH", "/api/conversations/a", {"titel": "x"}, "Nothing is to change"),
        ("PATCH", "/api/conversations/a", {"title": "x" * 201}, "title: expected"),
        ("PATCH", "/api/conversations/a", {"title": "a\nb"}, "title: "),
        ("PATCH", "/api/conversations/a", {"tags": ["x"] * 21}, "tags: "),
        ("PATCH", "/api/conversations/a", {"tags": [" "]}, "tags"),
        ("PATCH", "/api/conversations/a", {"tags": [f"t{n}" for n in range(20)] + ["x" * 51]}, "tags"),
        ("PATCH", "/api/conversations", {"conversation_ids": ["a"]}, "Nothing is to change"),
        ("PATCH", "/api/conversations", {"conversation_ids": [], "pinned": True}, "conversation_ids: "),
        ("PATCH", "/api/conversations", {"conversation_ids": ["a"] * 101, "pinned": True}, "conversation_ids: "),
        ("PATCH", "/api/conversations", {"conversation_ids": ["a"], "deleted": True, "pinned": True}, "deleted: "),
        ("GET", "/api/conversations?limit=101", None, "limit: "),
        ("GET", "/api/conversations?archived=maybe", None, "archived: "),
        ("GET", "/api/conversations?source=title", None, "source: "),
        ("GET", "/api/conversations?status=done", None, "status: "),
        ("GET", f"/api/conversations?q={'x' * 201}", None, "q: "),
        ("DELETE", "/api/conversations/a?really=yes", None, "really: unknown filter"),
    ],
)
async def test_what_is_wrong_is_refused_and_changes_nothing(
    api: httpx.AsyncClient, method: str, path: str, body: Any, detail: str
) -> None:
    await queue(api, "a")
    before = (await api.get("/api/conversations/a")).json()
    answer = await api.request(method, path, json=body) if body is not None else await api.request(method, path)
    assert answer.status_code == 400, answer.text
    assert detail in answer.json()["detail"]
    assert (await api.get("/api/conversations/a")).json() == before


async def test_a_query_of_signs_alone_is_looked_for_as_it_stands(api: httpx.AsyncClient) -> None:
    await queue(api, "a", "100 % ☃ (sure)")
    await queue(api, "b", "東京は日本の首都です")
    assert await ids(api, q="☃") == ["a"]
    assert await ids(api, q="日本") == ["b"]
    assert await ids(api, q='"') == []
    assert await ids(api, q="sure") == ["a"], "a search indexes what is new, and waits for no worker"
    for hostile in ("NEAR(a b)", "a OR b", "text:a", "^a", "a*", "'; DROP TABLE texts", "(", "-sure", "%", "_"):
        assert set(await ids(api, q=hostile)) <= {"a"}


def rows(page: httpx.Response) -> list[str]:
    return [unescape(one) for one in re.findall(r'<li id="conversation-([^"]+)"', page.text)]


def form(page: httpx.Response, public_id: str, action: str, **fields: str) -> dict[str, str]:
    (token,) = set(re.findall(r'name="csrf_token" value="([^"]+)"', page.text))
    assert f'<input type="hidden" name="id" value="{public_id}">' in page.text
    assert f'name="action" value="{action}"' in page.text
    return {"csrf_token": token, "id": public_id, "action": action, **fields}


async def test_a_person_renames_pins_archives_and_deletes_without_scripts(browser: httpx.AsyncClient) -> None:
    for name in "abc":
        await queue(browser, name, f"prompt {name}")
    page = await browser.get("/chat/conversations")
    headers = {"Referer": str(page.url)}

    async def send(fields: dict[str, Any]) -> httpx.Response:
        answer = await browser.post("/chat/conversation/change", data=fields, headers=headers)
        assert answer.status_code == 303, answer.text
        shown = await browser.get(answer.headers["location"])
        headers["Referer"] = str(shown.url)
        return shown

    page = await send(form(page, "a", "rename", title="<b>A name</b>"))
    assert "&lt;b&gt;A name&lt;/b&gt;" in page.text
    page = await send(form(page, "a", "pin"))
    assert rows(page) == ["a", "c", "b"]
    assert "<h2>Pinned</h2>" in page.text
    assert "<h2>Today</h2>" in page.text
    page = await send(form(page, "b", "archive"))
    assert rows(page) == ["a", "c"]
    page = await send(form(page, "c", "delete"))
    assert rows(page) == ["a"]
    assert "The conversation was deleted." in page.text
    (moment,) = re.findall(r'name="deleted" value="(\d+)"', page.text)
    token = form(page, "a", "unpin")["csrf_token"]
    page = await send({"csrf_token": token, "action": "undo", "deleted": moment})
    assert rows(page) == ["a", "c"]
    assert "deleted." not in page.text
    page = await send({"csrf_token": token, "action": "tag", "tag": "work", "id": ["a", "c"]})
    found = await browser.get("/chat/conversations", params={"tag": "work", "archived": "", "source": "", "q": ""})
    assert rows(found) == ["c", "a"]
    found = await browser.get("/chat/conversations", params={"tag": "work", "status": "queued"})
    assert rows(found) == ["a"], "the other's jobs were cancelled with it"
    assert '<option value="queued" selected>Queued</option>' in found.text
    assert 'data-live="/chat/conversation/list?tag=work&amp;status=queued"' in found.text
    for nothing in ("/chat/conversations?status=error", "/chat/conversation/list?status=processing"):
        assert rows(await browser.get(nothing)) == [], nothing
    page = await send({"csrf_token": token, "action": "delete", "id": ["a", "c"]})
    assert "2 conversations were deleted." in page.text
    assert rows(await browser.get("/chat/conversations?archived=true")) == ["b"]
    for refused in ({"action": "tag"}, {"action": "explode"}, {"action": "rename", "title": "x\ny"}):
        answer = await browser.post("/chat/conversation/change", data={"csrf_token": token, **refused})
        assert answer.status_code == 400, refused


async def test_a_word_of_a_route_is_an_id_like_others(api: httpx.AsyncClient) -> None:
    base = "/api/conversations/"
    paths = [route.path for route in ROUTES.new().routes]
    hidden = {path.removeprefix(base) for path in paths if re.fullmatch(f"{base}[^{{]+", path)}
    assert hidden == {"import"}
    assert [path for path in paths if re.match("/chat/conversations/[^{]", path)] == []
    for word in hidden:
        await queue(api, word)
        assert (await api.patch(base + word, json={"title": "a name"})).json()["title"] == "a name"
        assert (await api.get(base + word)).json()["title"] == "a name"
        assert (await api.delete(base + word)).json()["changed"] == [word]
        assert (await api.get(base + word)).status_code == 404
        assert (await api.post(f"{base}{word}/restore")).json()["conversation_id"] == word


async def test_the_page_shows_where_the_words_stand(browser: httpx.AsyncClient) -> None:
    await queue(browser, "a", "so <i>many</i> words, and one needle & more")
    page = await browser.get("/chat/conversations", params={"q": "needle"})
    assert "one <mark>needle</mark> &amp; more" in page.text
    assert "&lt;i&gt;many" in page.text
    assert 'value="needle"' in page.text
    nothing = await browser.get("/chat/conversations", params={"q": "nothing of that"})
    assert "No conversation matches." in nothing.text


async def test_a_delete_that_was_asked_for_elsewhere_leads_to_the_list(browser: httpx.AsyncClient) -> None:
    await queue(browser, "a")
    headers = {"Referer": f"{browser.base_url}/chat/conversations/a"}
    answer = await browser.post("/chat/conversation/change", data={"action": "delete", "id": "a"}, headers=headers)
    assert re.fullmatch(r"/chat/conversations\?deleted=\d+", answer.headers["location"])


async def test_all_of_a_page_can_be_chosen_without_an_origin(config: Config) -> None:
    async with serving(config) as client:
        await log_in(client)
        for number in range(CONVERSATIONS_ON_PAGE):
            await queue(client, f"c{number}")
        page = await client.get("/chat/conversations")
        fields = form(page, "c1", "archive") | {"id": rows(page), "tag": ""}
        del client.headers["Origin"]
        answer = await client.post("/chat/conversation/change", data=fields)
        assert answer.status_code == 303
        assert rows(await client.get("/chat/conversations")) == []


async def test_a_day_begins_where_the_viewer_is(browser: httpx.AsyncClient, database: Database) -> None:
    """Of what happened at UTC's last midnight; west of it that was the day before."""
    await queue(browser, "a")
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    await database.write(lambda connection: connection.execute(update(JobRow).values(created_at=midnight)))
    zones: dict[str, tzinfo] = {name: ZoneInfo(name) for name in ("Pacific/Kiritimati", "Pacific/Pago_Pago")}
    nowhere = ("", "../../etc/passwd", "/etc/passwd", "America", "No/Such_Place", "%00", "x" * 4000)
    for cookie, zone in [*zones.items(), *((name, UTC) for name in nowhere)]:
        browser.cookies.set("llamalith_zone", cookie)
        now, then = datetime.now(zone).date(), midnight.astimezone(zone).date()
        words = {0: "Today", 1: "Yesterday"}[(now - then).days]
        page = await browser.get("/chat/conversations")
        assert page.text.count(f"<h2>{words}</h2>") == 2, "in the list and in the sidebar"
        assert f"<h2>{words}</h2>" in (await browser.get("/chat/conversation/list")).text
        jobs = await browser.get(f"/chat/jobs?since={then}&until={then}")
        assert 'id="job-1"' in jobs.text, cookie
        assert f"From ({zone})" in jobs.text
        before = then - timedelta(days=1)
        assert 'id="job-1"' not in (await browser.get(f"/chat/jobs?since={before}&until={before}")).text, cookie
