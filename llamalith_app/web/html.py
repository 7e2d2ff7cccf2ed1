"""Renders pages: the Jinja environment with its filters, the static files, and errors as pages.

Used by the page controllers. Everything that a page shows comes from its handler and is escaped.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import zlib
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
from markupsafe import Markup

from llamalith_app.contracts.jobs import SAME_AGAIN_KINDS, Job, JobBrief
from llamalith_app.contracts.parameters import NAMES, Parameters, texts_of
from llamalith_app.errors import LlamalithError, NotFound
from llamalith_app.guards.cookies import cookie_value
from llamalith_app.guards.principal import BACKGROUND, OPEN
from llamalith_app.settings.config import ModelConfig
from llamalith_app.web import problems
from llamalith_app.web.live import may_grow
from llamalith_app.web.markdown import before_reply, markdown
from llamalith_app.web.paths import is_openai
from llamalith_app.web.visible import Kind, visible, visible_html

ROOT = Path(__file__).parents[2]
SETTLE = timedelta(seconds=10)
"""How long after a cancel a job's partial reply may still grow; longer than a step of any engine."""
TEMPLATES = ROOT / "templates"
STATIC = ROOT / "static"
ASSETS = {path.relative_to(STATIC).as_posix(): path.read_bytes() for path in STATIC.rglob("*") if path.is_file()}
"""The static files by name, in memory: a name from a request is looked up and never becomes a path."""
TITLE_CHARS = 60
DOTS = (".", "..")
"""Browsers remove these segments from a path, encoded or not."""
VERSION = hashlib.sha256(repr(sorted(ASSETS.items())).encode()).hexdigest()[:12]
"""Of all static files, and part of their path: a module's imports are then requested under the same version."""
MODULES = sorted(name for name in ASSETS if re.fullmatch(r"(?!app|monitor|shared-worker|sw)[\w-]+\.js", name))
"""The modules that app.js imports. Pages name them too, so that a browser loads all of them at once."""
MEDIA_TYPES = {
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
    "png": "image/png",
    "txt": "text/plain",
    "webmanifest": "application/manifest+json",
    "woff2": "font/woff2",
}

THEME_COOKIE = "llamalith_theme"
THEMES = ("light", "dark")
"""Without a cookie a page looks as the system has it."""
SIDEBAR_COOKIE = "llamalith_sidebar"


def template_config() -> TemplateConfig[JinjaTemplateEngine]:
    """Litestar's template configuration, with the functions, filters and tests that templates use."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.i18n"],
    )
    environment.policies["ext.i18n.trimmed"] = True
    # The texts in templates and code are English; `locale/` has what a translation is made from.
    environment.install_null_translations(newstyle=True)  # type: ignore[attr-defined]
    environment.globals["random_key"] = lambda: secrets.token_urlsafe(16)
    environment.globals["static"] = lambda name: f"/chat/static/{VERSION}/{name}"
    environment.globals["modules"] = MODULES
    environment.filters |= {
        "conversation_url": conversation_url,
        "query": query,
        "iso": lambda moment: moment.isoformat(timespec="seconds"),
        "utc": lambda moment: f"{moment:%Y-%m-%d %H:%M} UTC",
        "seconds_until": _seconds_until,
        "duration": duration,
        "size": _size,
        "ticks": _with_code,
        "plain_name": visible,
        "name": visible_html,
        "first_words": _first_words,
        "elapsed": lambda moment: _in_seconds(datetime.now(UTC) - moment),
        "defaults": lambda model: texts_of(_default_parameters(model)),
        "markdown": markdown,
        "reply": lambda text, job: markdown(before_reply(job.parameters) + text),
        "excerpt": lambda text: visible_html(text, Kind.EXCERPT),
        "plain_excerpt": lambda text: visible(text, Kind.EXCERPT),
        "merge": lambda fields, more: {**fields, **more},
        "checksum": lambda text: zlib.crc32(text.encode()),
        "month": lambda first: f"{first:%B %Y}",
    }
    environment.tests["changing"] = _is_changing
    environment.tests["any_changing"] = lambda jobs: any(map(_is_changing, jobs))
    environment.tests["same_again"] = _ends_the_same_again
    return TemplateConfig(instance=JinjaTemplateEngine.from_environment(environment))


@get(
    [
        *("/static/{name:str}", "/static/{version:str}/{name:str}", "/static/{version:str}/{folder:str}/{name:str}"),
        "/static/{version:str}/{folder:str}/{subfolder:str}/{name:str}",
    ],
    opt=OPEN | BACKGROUND,
)
async def asset(
    name: FromPath[str], version: FromPath[str] = "", folder: FromPath[str] = "", subfolder: FromPath[str] = ""
) -> Response[bytes]:
    name = "/".join(part for part in (version, folder, subfolder, name) if part)
    if name not in ASSETS:
        version, _, name = name.partition("/")
    if name not in ASSETS:
        raise NotFound("There is no such file.")
    return Response(
        ASSETS[name],
        media_type=MEDIA_TYPES[name.rpartition(".")[2]],
        # Cached for ever only under this version: during an update a page of another version may ask too.
        headers={"Cache-Control": "public, max-age=31536000, immutable" if version == VERSION else "no-cache"},
    )


def page(request: Request[Any, Any, Any], name: str, *, status_code: int = 200, **context: Any) -> Template:
    """The template of this name as a page. Adds `principal` (None without a login), `csrf_token` and how the person
    wants pages to look to the context."""
    principal = request.state.get("principal")
    theme = cookie_value(request, THEME_COOKIE)
    frame = {
        "principal": principal,
        "csrf_token": principal.csrf_token if principal else "",
        "theme": theme if theme in THEMES else "",
        "sidebar_is_closed": cookie_value(request, SIDEBAR_COOKIE) == "closed",
        "chats": request.state.get("chats"),
    }
    return Template(
        f"{name}.html",
        context=frame | context,
        status_code=status_code,
        media_type=MediaType.HTML,
    )


def part(request: Request[Any, Any, Any], name: str, **context: Any) -> str:
    """The template of this name as HTML that a script puts into a page."""
    return str(request.app.template_engine.get_template(f"{name}.html").render(**context))  # type: ignore[union-attr]


def conversation_url(public_id: str) -> str:
    """The URL of a conversation's page.

    An id with a slash goes into the query, because not every proxy passes on an encoded slash; so does an id of dots
    alone, which cannot be a path segment.
    """
    if "/" in public_id or public_id in DOTS:
        return f"/chat/conversation?id={quote(public_id, safe='')}"
    return f"/chat/conversations/{quote(public_id, safe='')}"


def wants_html(request: Request[Any, Any, Any]) -> bool:
    """Whether the request is for a page and its client accepts HTML."""
    path = request.scope["path"]
    return (
        path.startswith("/chat")
        and not path.startswith("/chat/api")
        and not is_openai(path)
        and "text/html" in request.headers.get("accept", "")
    )


def answer_own_error(request: Request[Any, Any, Any], error: LlamalithError) -> Response[Any]:
    """The exception handler for our own errors, as a page or as a problem."""
    return _as_page_if_wanted(request, problems.from_own_error(request, error))


def answer_litestar_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    """The exception handler for Litestar's errors, as a page or as a problem."""
    return _as_page_if_wanted(request, problems.from_litestar_error(request, error))


def answer_unexpected_error(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """The exception handler for all other errors, as a page or as a problem."""
    return _as_page_if_wanted(request, problems.from_unexpected_error(request, error))


def _as_page_if_wanted(request: Request[Any, Any, Any], answer: Response[Any]) -> Response[Any]:
    """The problem as a page if the client asked for a page, else as it is."""
    if not wants_html(request):
        return answer
    problem = answer.content
    shown = page(
        request, "error", status_code=problem.status, problem=problem, phrase=HTTPStatus(problem.status).phrase
    )
    shown.headers.update({name: value for name, value in answer.headers.items() if name.lower() != "www-authenticate"})
    return shown


def _is_changing(job: Job) -> bool:
    """Whether the job may still change: it has not ended, or was cancelled within SETTLE and its partial may grow, or
    its turn may go with it."""
    if job.status in ("queued", "processing"):
        return True
    may_change = may_grow(job) or (job.status == "cancelled" and job.started_at is None)
    return may_change and job.processed_at is not None and datetime.now(UTC) - job.processed_at < SETTLE


def _ends_the_same_again(job: JobBrief) -> bool:
    """Whether the job ended with an error that a retry would meet again."""
    return job.error is not None and job.error.kind in SAME_AGAIN_KINDS


def query(fields: dict[str, object]) -> str:
    """A URL query of the fields that are not empty."""
    return urlencode({name: value for name, value in fields.items() if value not in (None, "")})


def _first_words(text: str) -> str:
    """The beginning of a text in one line, for a title."""
    line = " ".join(text[: 4 * TITLE_CHARS].split())
    return visible(line if len(line) <= TITLE_CHARS else f"{line[:TITLE_CHARS].rstrip()}…", Kind.EXCERPT)


def _default_parameters(model: ModelConfig) -> Parameters:
    return Parameters(**{name: getattr(model.settings, name, None) for name in NAMES})


def _in_seconds(time: timedelta) -> str:
    """As a clock that runs: whole seconds."""
    seconds = max(0, int(time.total_seconds()))
    return f"{seconds} s" if seconds < 60 else f"{seconds // 60} min {seconds % 60:02} s"


def _seconds_until(started: datetime, ended: datetime) -> str:
    return duration((ended - started).total_seconds())


def _with_code(text: str) -> Markup:
    """A docstring as HTML: what stands between backticks is code."""
    parts = text.split("`")
    return Markup().join(Markup("<code>{}</code>").format(part) if n % 2 else part for n, part in enumerate(parts))


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """In the largest unit of which there are some."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    for unit, name, limit_s in ((60, "min", 6000), (3600, "h", 360_000)):
        if seconds < limit_s:
            return f"{seconds / unit:.1f}".removesuffix(".0") + f" {name}"
    return f"{seconds / 86_400:.1f}".removesuffix(".0") + " days"
