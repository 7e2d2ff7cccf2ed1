"""What a browser does over https: cookies of this host alone, and nothing left behind by a logout."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser, expect

from llamalith_app.app import create_server
from tests.browser.conftest import window
from tests.needs import need
from tests.web.conftest import PASSWORD, make_config


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A key and its certificate, which nobody else has signed."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *(need("openssl", "openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    return key, certificate


@pytest.fixture
async def origin(
    tmp_path: Path, database_path: Path, redis_url: str, certificate: tuple[Path, Path]
) -> AsyncIterator[str]:
    """The web behind TLS."""
    config = make_config(tmp_path, database_path, redis_url)
    server = create_server(config)
    server.config.ssl_keyfile, server.config.ssl_certfile = certificate[0], str(certificate[1])
    listener = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()


async def test_over_https_what_was_sent_is_no_draft_any_more_and_a_logout_leaves_nothing(
    origin: str, chromium: Browser
) -> None:
    async with window(chromium, origin, ignore_https_errors=True, timezone_id="Europe/Oslo") as browser:
        page = await browser.page("/chat/jobs")
        await page.get_by_label("Password").fill(PASSWORD)
        await page.get_by_role("button", name="Log in").click()
        await expect(page).to_have_url(f"{origin}/chat/jobs")
        names = {cookie["name"] for cookie in await browser.context.cookies()}
        assert names == {"__Host-llamalith_session", "__Host-llamalith_zone"}
        await page.get_by_role("link", name="New chat").click()
        await page.get_by_label("Message").fill("Say hello.")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#job-1")).to_be_visible()
        await expect(page.get_by_label("Message")).to_have_value("")
        kept = "Object.keys(sessionStorage).filter((key) => key.startsWith('typed '))"
        found = await page.evaluate(f"[document.cookie, sessionStorage.taken?.length > 4, {kept}]")
        assert found == ["__Host-llamalith_zone=Europe/Oslo", True, []]
        await page.evaluate("localStorage.kept = 1")
        await page.get_by_role("button", name="Log out").click()
        await expect(page.get_by_role("heading", name="Log in")).to_be_visible()
        # Where the browser is any page may ask it.
        assert [cookie["name"] for cookie in await browser.context.cookies()] == ["__Host-llamalith_zone"]
        assert await page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 0]
