"""The logout, and the question before it where another site may have sent the visitor."""

from __future__ import annotations

import structlog
from litestar import Controller, get, post
from litestar.response import Redirect, Template

from llamalith_app.contracts.principal import Principal
from llamalith_app.controllers.pages.redirects import LOGIN, see_other
from llamalith_app.guards.cookies import is_https
from llamalith_app.guards.origin import may_be_sent_from_elsewhere
from llamalith_app.guards.principal import OPEN, PAGE
from llamalith_app.web.html import page
from llamalith_app.web.request import AppRequest
from llamalith_app.web.request_log import is_head

log = structlog.get_logger(__name__)


class LogoutPage(Controller):
    path = "/logout"
    include_in_schema = False

    @get(opt=OPEN)
    async def ask(self, request: AppRequest) -> Redirect | Template:
        """For links of our own and for programs. A visitor whom another site may have sent here is asked first, and a
        HEAD ends nothing."""
        session = await request.parts.sessions.find(request)
        if session is None:
            return see_other(LOGIN)
        if is_head(request) or may_be_sent_from_elsewhere(request):
            request.state.principal = Principal(session.user_id, "session", session.csrf_token)
            return page(request, "logout")
        return await _end_session(request)

    @post(opt=PAGE, status_code=303)
    async def log_out(self, request: AppRequest) -> Redirect:
        return await _end_session(request)


async def _end_session(request: AppRequest) -> Redirect:
    answer = see_other(LOGIN, await request.parts.sessions.end(request))
    # Browsers ignore it over plain http.
    if is_https(request):
        # Not "cookies": they are everything that this host and its subdomains have set, on every port.
        answer.headers["Clear-Site-Data"] = '"cache", "storage"'
    log.info("logout", address=request.client.host if request.client else "")
    return answer
