"""How a page is made: the templates, what each of them may use, and errors for people instead of programs.

Owns the Jinja environment. What a page shows comes from its handler; everything is escaped.
"""

from __future__ import annotations

import hashlib
import secrets
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import jinja2
from litestar import MediaType, Request, Response, get
from litestar.exceptions import HTTPException
from litestar.params import FromPath
from litestar.plugins.jinja import JinjaTemplateEngine
from litestar.response import Template
from litestar.template import TemplateConfig

from llamalith_app.contracts.jobs import Job
from llamalith_app.contracts.problems import Problem
from llamalith_app.errors import LlamalithError, NotFound
from llamalith_app.guards.principal import BACKGROUND, OPEN
from llamalith_app.web import problems
from llamalith_app.web.live import may_grow
from llamalith_app.web.visible import Kind, visible, visible_html

ROOT = Path(__file__).parents[2]
SETTLE = timedelta(seconds=10)
"""Longer than a step of any engine takes."""
TEMPLATES = ROOT / "templates"
ASSETS = {path.name: path.read_bytes() for path in (ROOT / "static").iterdir()}
"""In memory: a name from outside is looked up, and never becomes a path."""
DOTS = (".", "..")
"""Browsers take these parts of a path away, encoded or not."""
VERSION = hashlib.sha256(repr(sorted(ASSETS.items())).encode()).hexdigest()[:12]
"""One for all files, in the path: what a module imports beside it is then asked for under the same version."""
MODULES = sorted(name for name in ASSETS if name.endswith(".js") and name not in ("app.js", "monitor.js"))
"""What app.js imports. Pages name them as well, so that a browser need not read one to learn of the next."""
MEDIA_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def template_config() -> TemplateConfig[JinjaTemplateEngine]:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["once"] = lambda: secrets.token_urlsafe(16)
    environment.globals["static"] = lambda name: f"/chat/static/{VERSION}/{name}"
    environment.globals["modules"] = MODULES
    environment.filters |= {
        "conversation_url": conversation_url,
        "events_url": _events_url,
        "query": _query,
        "iso": lambda moment: moment.isoformat(timespec="seconds"),
        "utc": lambda moment: f"{moment:%Y-%m-%d %H:%M} UTC",
        "seconds_until": _seconds_until,
        "plain_name": visible,
        "name": visible_html,
        "excerpt": lambda text: visible_html(text, Kind.EXCERPT),
    }
    environment.tests["changing"] = _is_changing
    return TemplateConfig(instance=JinjaTemplateEngine.from_environment(environment))


@get(["/static/{name:str}", "/static/{version:str}/{name:str}"], opt=OPEN | BACKGROUND)
async def asset(name: FromPath[str], version: FromPath[str] = "") -> Response[bytes]:
    if name not in ASSETS:
        raise NotFound("There is no such file.")
    return Response(
        ASSETS[name],
        media_type=MEDIA_TYPES[name.rpartition(".")[2]],
        # For good only under this very version: while an update goes on, another version's page asks as well.
        headers={"Cache-Control": "public, max-age=31536000, immutable" if version == VERSION else "no-cache"},
    )


def page(request: Request[Any, Any, Any], name: str, *, status_code: int = 200, **context: Any) -> Template:
    """`name`: of a template. Each also gets `principal`, None where nobody is logged in."""
    principal = request.state.get("principal")
    return Template(
        f"{name}.html",
        context={"principal": principal, "csrf_token": principal.csrf_token if principal else ""} | context,
        status_code=status_code,
        media_type=MediaType.HTML,
    )


def conversation_url(public_id: str) -> str:
    """The page of a conversation, whatever its id: dots alone can stand in no path, and a slash, though encoded, does
    not come through every proxy. Where a stream does not come through, the page asks now and then instead."""
    if "/" in public_id or public_id in DOTS:
        return f"/chat/conversation?id={quote(public_id, safe='')}"
    return f"/chat/conversations/{quote(public_id, safe='')}"


def _events_url(public_id: str) -> str | None:
    """The conversation's stream; None: its id can stand in no path, and its page asks now and then instead."""
    return None if public_id in DOTS else f"/chat/api/conversations/{quote(public_id, safe='')}/events"


def wants_html(request: Request[Any, Any, Any]) -> bool:
    path = request.scope["path"]
    return (
        path.startswith("/chat")
        and not path.startswith("/chat/api")
        and "text/html" in request.headers.get("accept", "")
    )


def of_ours(request: Request[Any, Any, Any], error: LlamalithError) -> Response[Any]:
    return _in_words(request, problems.of_ours(request, error))


def of_litestar(request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    return _in_words(request, problems.of_litestar(request, error))


def of_anything(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    return _in_words(request, problems.of_anything(request, error))


def _in_words(request: Request[Any, Any, Any], answer: Response[Problem]) -> Response[Any]:
    """The same problem as a page, for those who asked for one."""
    problem = answer.content
    # For the request's line in the log.
    request.scope["problem"] = problem.type.rpartition("/")[2]  # type: ignore[typeddict-unknown-key]
    if not wants_html(request):
        return answer
    shown = page(
        request, "error", status_code=problem.status, problem=problem, phrase=HTTPStatus(problem.status).phrase
    )
    shown.headers.update({name: value for name, value in answer.headers.items() if name.lower() != "www-authenticate"})
    return shown


def _is_changing(job: Job) -> bool:
    """It is open, or was cancelled just now, so that its worker may still add what was written of the reply."""
    if job.status in ("queued", "processing"):
        return True
    return may_grow(job) and job.processed_at is not None and datetime.now(UTC) - job.processed_at < SETTLE


def _query(fields: dict[str, object]) -> str:
    """A query of those fields that say something."""
    return urlencode({name: value for name, value in fields.items() if value not in (None, "")})


def _seconds_until(started: datetime, ended: datetime) -> str:
    seconds = (ended - started).total_seconds()
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
