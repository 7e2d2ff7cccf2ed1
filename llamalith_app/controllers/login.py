"""Login and logout. Owns where a visitor goes after these and other forms; passwords and sessions are the guards'."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import quote, unquote, urlsplit

import structlog
from litestar import Controller, Request, Response, get, post
from litestar.datastructures import Cookie
from litestar.params import QueryParameter
from litestar.response import Redirect, Template

from llamalith_app.contracts.forms import SHORT_FIELDS, JobForm, LoginForm
from llamalith_app.contracts.problems import Problem
from llamalith_app.errors import CrossSite, LoginNeeded, SessionUnreadable, StaleForm, StorageUnavailable, TooManyLogins
from llamalith_app.guards.cookies import cookie_value, make_cookie
from llamalith_app.guards.forms import ANONYMOUS_BYTES, form_fields
from llamalith_app.guards.origin import is_foreign, may_be_sent_from_elsewhere
from llamalith_app.guards.principal import OPEN, PAGE, Principal
from llamalith_app.web import html
from llamalith_app.web.html import page
from llamalith_app.web.request import AppRequest
from llamalith_app.web.request_log import is_head

HOME = "/chat/"
LOGIN = "/chat/login"
NEXT_COOKIE = "llamalith_next"
NEXT_KEPT_S = 600
MAX_NEXT_CHARS = 2000
"""It goes through a cookie and a header, of which proxies take some thousand bytes."""
MAX_SHOWN_CHARS = 4_000_000
"""Of a page that shows what was typed, as it stands in its HTML: one quotation mark is five characters there."""
OURS = re.compile(r"/chat(?:/(?!/)[^\\\x00-\x20\x7f]*)?(?:\?[^\\\x00-\x20\x7f]*)?")
"""A path below /chat: nothing that a browser could read as another host."""

log = structlog.get_logger(__name__)


class Doors(Controller):
    path = ""
    include_in_schema = False

    @get("/login", opt=OPEN)
    async def ask(
        self,
        request: AppRequest,
        going_to: Annotated[str, QueryParameter(name="next")] = "",
    ) -> Redirect | Template:
        kept = cookie_value(request, NEXT_COOKIE)
        target = _ours(going_to or kept)
        if await request.parts.sessions.find(request) is not None:
            return see(target)
        shown = page(request, "login", going_to=target, draft=None, wrong="")
        if kept:
            shown.cookies.append(_next_cookie(request, "", 0))
        return shown

    @post("/login", opt=OPEN, status_code=200, request_max_body_size=ANONYMOUS_BYTES)
    async def log_in(self, request: AppRequest) -> Redirect | Template:
        """A wrong password is a 401 with the form again, too many are a 429; what a form kept is kept on."""
        if is_foreign(request):
            raise CrossSite("This login was sent by another site, or by another port of this host.")
        form = await request.form_as(LoginForm)
        host = request.client.host if request.client else ""
        draft = await typed(request)
        target = _ours(form.next)
        try:
            if not await request.parts.passwords.is_correct(form.password, host, request.headers.get("host", "")):
                log.warning("login failed", address=host)
                return page(request, "login", status_code=401, going_to=target, draft=draft, wrong="Wrong password.")
            begun, session = await request.parts.sessions.begin(request)
        except (TooManyLogins, StorageUnavailable) as error:
            log.warning("login refused", address=host, reason=str(error))
            shown = page(request, "login", status_code=error.status, going_to=target, draft=draft, wrong=str(error))
            shown.headers["Retry-After"] = str(error.retry_after_s)
            return shown
        log.info("login", address=host)
        if draft is None:
            return see(target, begun)
        request.state.principal = Principal(session.user_id, "session", session.csrf_token)
        shown = draft_page(request, draft, HTTPStatus.OK, "You are logged in again. Nothing has been sent yet.")
        shown.cookies.append(begun)
        return shown

    @get("/logout", opt=OPEN)
    async def leave(self, request: AppRequest) -> Redirect | Template:
        """For links of our own and for programs. A visitor whom another site may have sent here is asked first, and a
        HEAD ends nothing."""
        session = await request.parts.sessions.find(request)
        if session is not None and (is_head(request) or may_be_sent_from_elsewhere(request)):
            request.state.principal = Principal(session.user_id, "session", session.csrf_token)
            return page(request, "logout")
        return see(LOGIN) if session is None else await self._out(request)

    @post("/logout", opt=PAGE, status_code=303)
    async def log_out(self, request: AppRequest) -> Redirect:
        return await self._out(request)

    async def _out(self, request: AppRequest) -> Redirect:
        answer = see(LOGIN, await request.parts.sessions.end(request))
        # Not "cookies": they are everything that this host and its subdomains have set, on every port.
        answer.headers["Clear-Site-Data"] = '"cache", "storage"'
        log.info("logout", address=request.client.host if request.client else "")
        return answer


@get("/", opt=OPEN, include_in_schema=False)
async def front_door() -> Redirect:
    """For people who type the address alone."""
    return see(HOME)


def see(path: str, *cookies: Cookie) -> Redirect:
    return Redirect(path, status_code=303, cookies=list(cookies))


async def typed(request: AppRequest) -> JobForm | None:
    """The prompt's form in the body as it came, good or not; None: no message is in it. Ids and names that are longer
    than any are left out: nothing of ours has made them, and all of the form is shown again."""
    return _as_typed(await form_fields(request))


def _as_typed(fields: dict[str, str]) -> JobForm | None:
    kept = {name: fields.get(name, "").replace("\r\n", "\n") for name in JobForm.__struct_fields__}
    kept |= {name: "" for name, limit in SHORT_FIELDS.items() if len(kept[name]) > limit}
    form = JobForm(**kept)
    return form if form.content.strip() else None


def draft_page(request: Request[Any, Any, Any], draft: JobForm, status: int, why: str) -> Template:
    """What was typed, in a form that can be sent again; or only why not, where that would be too long a page."""
    if sum(map(_shown_chars, (draft.content, draft.system_prompt, draft.system_prompt_was))) > MAX_SHOWN_CHARS:
        detail = f"{why.rstrip('.')}. It is too long to be shown here again: go back, your browser still has it."
        request_id = str(request.scope.get("request_id", ""))
        told = Problem(type="about:blank", title="Not sent yet", status=status, detail=detail, request_id=request_id)
        return page(request, "error", status_code=status, problem=told, phrase=HTTPStatus(status).phrase)
    return page(request, "draft", status_code=status, form=draft, why=why, models=request.app.state.parts.models)


def _shown_chars(text: str) -> int:
    return len(text) + 4 * sum(map(text.count, "&<>\"'"))


def of_stale_form(request: Request[Any, Any, Any], error: StaleForm) -> Response[Any]:
    """A form without a good CSRF token is shown again with one, and with what was typed."""
    session = request.state.get("session")
    draft = _as_typed(error.fields)
    if session is None or draft is None:
        return html.answer_own_error(request, error)
    request.state.principal = Principal(session.user_id, "session", session.csrf_token)
    return draft_page(request, draft, error.status, "This form was out of date and was not sent. Look it over.")


def of_session_unreadable(request: Request[Any, Any, Any], error: SessionUnreadable) -> Response[Any] | Template:
    """What was typed stays in a form that can be sent again."""
    draft = _as_typed(error.fields)
    return (
        html.answer_own_error(request, error) if draft is None else draft_page(request, draft, error.status, str(error))
    )


def of_login_needed(request: Request[Any, Any, Any], error: LoginNeeded) -> Response[dict[str, str]] | Template:
    """To the login, and back from there; with what was typed, where that was a prompt."""
    if error.fields is None:
        # The script of the page keeps what was typed in the tab, and puts it back where it came from.
        going_to = came_from(request)
        return page(request, "login", status_code=401, going_to=going_to, draft=None, wrong="", is_too_long=True)
    draft = _as_typed(error.fields)
    if draft is not None:
        return page(request, "login", status_code=401, going_to=HOME, draft=draft, wrong="")
    answer = Response({"detail": "See Other"}, status_code=303, headers={"Location": LOGIN})
    is_navigation = request.headers.get("sec-fetch-mode", "navigate") == "navigate"
    if request.scope["method"] == "GET" and is_navigation and not request.route_handler.opt.get("background"):
        query = request.scope["query_string"].decode("latin-1")
        path = (request.scope.get("raw_path") or b"").decode("latin-1") + (f"?{query}" if query else "")
        target = _ours(path)
        if target.rstrip("/") != HOME.rstrip("/"):
            answer.cookies.append(_next_cookie(request, target, NEXT_KEPT_S))
    return answer


def came_from(request: Request[Any, Any, Any]) -> str:
    """The page of ours whose form was sent, as far as its browser tells; else the dashboard. A path alone, whatever
    host it names."""
    try:
        referer = urlsplit(request.headers.get("referer", ""))
    except ValueError:
        return HOME
    return _ours(referer.path + (f"?{referer.query}" if referer.query else ""))


def _ours(path: str) -> str:
    """`path` where it is a page of ours, as it may stand in a header; else the dashboard."""
    # What a cookie cannot hold is quoted; what was quoted stays as it is.
    quoted = quote(path, safe="/?&=%+:@!$'()*~-._")
    parts = unquote(quoted.partition("?")[0]).split("/")
    is_ours = OURS.fullmatch(path) is not None and not {".", ".."} & set(parts)
    is_page = parts[2:3] not in (["api"], ["login"], ["logout"])
    return quoted if is_ours and is_page and len(quoted) <= MAX_NEXT_CHARS else HOME


def _next_cookie(request: Request[Any, Any, Any], path: str, max_age: int) -> Cookie:
    # Not in the address: there it would stay in the history, and the login's address is the same for everybody.
    return make_cookie(request, NEXT_COOKIE, path, max_age, path=LOGIN)
