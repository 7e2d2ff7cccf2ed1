"""The login: its page, what a right or wrong password leads to, and the way back to the page that was asked for.

Passwords and sessions belong to the guards.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any

import structlog
from litestar import Controller, Request, Response, get, post
from litestar.datastructures import Cookie
from litestar.params import QueryParameter
from litestar.response import Redirect, Template

from llamalith_app.contracts.forms import LoginForm
from llamalith_app.contracts.principal import Principal
from llamalith_app.controllers.pages.draft import draft_in, draft_page, typed_draft
from llamalith_app.controllers.pages.redirects import HOME, LOGIN, own_page, referring_page, see_other
from llamalith_app.errors import CrossSite, LoginNeeded, StorageUnavailable, TooManyLogins
from llamalith_app.guards.cookies import cookie_value, make_cookie
from llamalith_app.guards.forms import ANONYMOUS_BYTES
from llamalith_app.guards.origin import is_foreign
from llamalith_app.guards.principal import OPEN
from llamalith_app.web.html import page
from llamalith_app.web.request import AppRequest

NEXT_COOKIE = "llamalith_next"
NEXT_KEPT_S = 600

log = structlog.get_logger(__name__)


class LoginPage(Controller):
    path = "/login"
    include_in_schema = False

    @get(opt=OPEN)
    async def ask(
        self,
        request: AppRequest,
        going_to: Annotated[str, QueryParameter(name="next")] = "",
    ) -> Redirect | Template:
        kept = cookie_value(request, NEXT_COOKIE)
        target = own_page(going_to or kept)
        if await request.parts.sessions.find(request) is not None:
            return see_other(target)
        shown = page(request, "login", going_to=target, draft=None, wrong="")
        if kept:
            shown.cookies.append(_next_cookie(request, "", 0))
        return shown

    @post(opt=OPEN, status_code=200, request_max_body_size=ANONYMOUS_BYTES)
    async def log_in(self, request: AppRequest) -> Redirect | Template:
        """A wrong password is a 401 with the form again, too many are a 429; a draft in the form is kept on."""
        if is_foreign(request):
            raise CrossSite("This login was sent by another site, or by another port of this host.")
        form = await request.form_as(LoginForm)
        host = request.client.host if request.client else ""
        draft = await typed_draft(request)
        target = own_page(form.next)
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
            return see_other(target, begun)
        request.state.principal = Principal(session.user_id, "session", session.csrf_token)
        shown = draft_page(request, draft, HTTPStatus.OK, "You are logged in again. Nothing has been sent yet.")
        shown.cookies.append(begun)
        return shown


def answer_login_needed(request: Request[Any, Any, Any], error: LoginNeeded) -> Response[dict[str, str]] | Template:
    """To the login, and back from there; with the draft, where the request was a prompt's form."""
    if error.fields is None:
        # The script of the page keeps what was typed in the tab, and puts it back where it came from.
        going_to = referring_page(request)
        return page(request, "login", status_code=401, going_to=going_to, draft=None, wrong="", is_too_long=True)
    draft = draft_in(error.fields)
    if draft is not None:
        return page(request, "login", status_code=401, going_to=HOME, draft=draft, wrong="")
    answer = Response({"detail": "See Other"}, status_code=303, headers={"Location": LOGIN})
    is_navigation = request.headers.get("sec-fetch-mode", "navigate") == "navigate"
    if request.scope["method"] == "GET" and is_navigation and not request.route_handler.opt.get("background"):
        query = request.scope["query_string"].decode("latin-1")
        path = (request.scope.get("raw_path") or b"").decode("latin-1") + (f"?{query}" if query else "")
        target = own_page(path)
        if target.rstrip("/") != HOME.rstrip("/"):
            answer.cookies.append(_next_cookie(request, target, NEXT_KEPT_S))
    return answer


def _next_cookie(request: Request[Any, Any, Any], path: str, max_age: int) -> Cookie:
    # Not in the address: there it would stay in the history, and the login's address is the same for everybody.
    return make_cookie(request, NEXT_COOKIE, path, max_age, path=LOGIN)
