"""The dashboard: the form of a new job, and the newest jobs beside it."""

from __future__ import annotations

from litestar import Controller, get
from litestar.response import Redirect, Template

from llamalith_app.contracts.forms import JobForm
from llamalith_app.controllers.models import engines
from llamalith_app.controllers.pages.jobs import NEWEST_ON_DASHBOARD, newest_jobs
from llamalith_app.controllers.pages.redirects import HOME, see_other
from llamalith_app.guards.principal import OPEN, PAGE
from llamalith_app.web.html import page
from llamalith_app.web.request import AppRequest


class DashboardPage(Controller):
    path = "/"
    include_in_schema = False

    @get(opt=PAGE)
    async def dashboard(self, request: AppRequest) -> Template:
        jobs = await newest_jobs(request, NEWEST_ON_DASHBOARD)
        return page(
            request,
            "dashboard",
            jobs=jobs,
            models=request.parts.models,
            engines=await engines(request.parts),
            form=JobForm(model=jobs[0].model if jobs else ""),
            status="",
            before=None,
            limit=NEWEST_ON_DASHBOARD,
        )


@get("/", opt=OPEN, include_in_schema=False)
async def front_door() -> Redirect:
    """For people who type the host's address alone."""
    return see_other(HOME)
