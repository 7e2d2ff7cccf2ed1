"""What a browser loads besides the pages: how much it is, what the catalogue of texts has, and what is kept offline."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import httpx
from babel.messages.frontend import CommandLineInterface
from babel.messages.pofile import read_po

from llamalith_app.web.html import ASSETS, MODULES

ROOT = Path(__file__).parents[2]
MAX_BYTES = 80 * 1024


def test_our_own_files_are_small() -> None:
    ours = {name: data for name, data in ASSETS.items() if not name.startswith("katex/")}
    assert sum(len(gzip.compress(data)) for data in ours.values()) <= MAX_BYTES


def test_every_text_of_the_pages_stands_in_the_catalogue(tmp_path: Path) -> None:
    """`make messages` writes it."""
    made = tmp_path / "made.pot"
    CommandLineInterface().run(  # type: ignore[no-untyped-call]
        [
            *("pybabel", "--quiet", "extract", "--mapping", str(ROOT / "locale/babel.cfg"), "--keyword", "_"),
            *("--no-location", "--sort-output", "--omit-header", "--output", str(made)),
            *(str(ROOT / folder) for folder in ("templates", "static", "llamalith_app")),
        ]
    )
    with made.open() as fresh, (ROOT / "locale/llamalith.pot").open() as kept:
        texts = [{message.id for message in read_po(file)} for file in (fresh, kept)]
    assert texts[0] == texts[1], "run make messages"
    assert "New chat" in texts[0]


async def test_the_app_can_be_installed_and_what_is_kept_of_it_is_nobody_s(browser: httpx.AsyncClient) -> None:
    page = (await browser.get("/chat/")).text
    (address,) = re.findall(r'<link rel="manifest" href="([^"]+)"', page)
    answer = await browser.get(address)
    assert answer.headers["content-type"] == "application/manifest+json"
    manifest = json.loads(answer.text)
    assert (manifest["start_url"], manifest["scope"]) == ("/chat/", "/chat/")
    for icon in manifest["icons"]:
        shown = await browser.get(f"{address.rpartition('/')[0]}/{icon['src']}")
        assert shown.headers["content-type"] == icon["type"]
    worker = await browser.get("/chat/sw.js?v=1")
    assert (worker.status_code, worker.headers["cache-control"]) == (200, "no-cache")
    assert "sw.js" not in MODULES
    offline = await browser.get("/chat/offline")
    assert "No connection to Llamalith" in offline.text
    assert "csrf_token" not in offline.text
    assert "Log out" not in offline.text
