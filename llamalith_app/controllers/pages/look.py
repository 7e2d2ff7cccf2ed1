"""How the pages look in one browser: its theme, and whether the sidebar shows.

Kept in cookies, which the server reads, so that a page is right when it is first painted. `web/html.py` reads them.
"""

from __future__ import annotations

from litestar import Controller, post
from litestar.response import Redirect

from llamalith_app.contracts.forms import LookForm
from llamalith_app.controllers.pages.redirects import referring_page, see_other
from llamalith_app.guards.cookies import make_cookie
from llamalith_app.guards.principal import PAGE
from llamalith_app.web.html import SIDEBAR_COOKIE, THEME_COOKIE
from llamalith_app.web.request import AppRequest

KEPT_S = 400 * 24 * 3600
"""Browsers keep no cookie longer."""


class LookPage(Controller):
    path = "/look"
    include_in_schema = False

    @post(opt=PAGE, status_code=303)
    async def change(self, request: AppRequest) -> Redirect:
        """Back to the page of the button."""
        form = await request.form_as(LookForm)
        answer = see_other(referring_page(request))
        for name, value, default in ((THEME_COOKIE, form.theme, "system"), (SIDEBAR_COOKIE, form.sidebar, "open")):
            if value is not None:
                max_age = 0 if value == default else KEPT_S
                answer.cookies.append(make_cookie(request, name, value, max_age, path="/chat"))
        return answer
