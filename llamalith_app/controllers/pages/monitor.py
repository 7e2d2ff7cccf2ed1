"""SAQ's monitor under /chat/queue: its own script, our shell, and nothing that it could change."""

from __future__ import annotations

from typing import Any

from litestar import Controller, HttpMethod, Request, Response, get, route
from litestar.params import FromPath
from litestar.response import Redirect, Template

from llamalith_app.controllers.pages.login import answer_login_needed
from llamalith_app.controllers.pages.redirects import see_other
from llamalith_app.errors import LoginNeeded, NotFound, ReadOnly, RedisUnavailable
from llamalith_app.guards.principal import BACKGROUND_PAGE, OPEN, PAGE
from llamalith_app.web.html import page
from llamalith_app.web.request import AppRequest

ROOT = "/chat/queue"
SHELLS = ["/", "/queues/{queue:str}", "/queues/{queue:str}/jobs/{job:str}"]
QUEUES, QUEUE, TASK = "/api/queues", "/api/queues/{queue:str}", "/api/queues/{queue:str}/jobs/{job:str}"
MEDIA_TYPE = "text/javascript"


def answer_redis_unavailable(_: Request[Any, Any, Any], error: RedisUnavailable) -> Response[dict[str, str]]:
    """SAQ's script shows `error` and ignores the status."""
    return Response(
        {"error": f"Redis does not answer, or not as it should ({error}). Jobs are accepted and run without it."}
    )


def answer_session_ended(request: Request[Any, Any, Any], error: LoginNeeded) -> Response[Any] | Template:
    """SAQ's script cannot follow a redirect to the login."""
    if not request.route_handler.opt.get("background"):
        return answer_login_needed(request, error)
    return Response({"error": "Your session has ended. Log in, and load this page again."}, status_code=401)


class MonitorPage(Controller):
    path = "/queue"
    include_in_schema = False
    exception_handlers = {  # noqa: RUF012 - Litestar's own way to say it
        RedisUnavailable: answer_redis_unavailable,
        LoginNeeded: answer_session_ended,
    }

    @get(SHELLS, opt=PAGE)
    async def shell(
        self,
        request: AppRequest,
        queue: FromPath[str] = "",  # noqa: ARG002 - the script reads them from the address
        job: FromPath[str] = "",  # noqa: ARG002
    ) -> Redirect | Template:
        raw_path = request.scope.get("raw_path") or b""
        if raw_path.split(b"?")[0].endswith(b"/queue"):
            # The script knows its home by the slash alone.
            return see_other(f"{ROOT}/")
        return page(request, "monitor", root=ROOT)

    @get("/static/{name:str}", opt=PAGE)
    async def asset(self, request: AppRequest, name: FromPath[str]) -> Response[bytes]:
        if name == "root.js":
            # An inline script in SAQ's own shell, which our content policy forbids.
            return Response(f'const root_path = "{ROOT}";\n'.encode(), media_type=MEDIA_TYPE)
        if name not in request.parts.monitor.assets:
            raise NotFound("The monitor has no such file.")
        return Response(request.parts.monitor.assets[name], media_type=MEDIA_TYPE)

    @get(QUEUES, opt=BACKGROUND_PAGE)
    async def queues(self, request: AppRequest) -> dict[str, object]:
        return {"queues": await request.parts.monitor.queues()}

    @get(QUEUE, opt=BACKGROUND_PAGE)
    async def queue(self, request: AppRequest, queue: FromPath[str]) -> dict[str, object]:
        found = await request.parts.monitor.queue(queue)
        return {"error": "There is no such queue."} if found is None else {"queue": found}

    @get(TASK, opt=BACKGROUND_PAGE)
    async def job(self, request: AppRequest, queue: FromPath[str], job: FromPath[str]) -> dict[str, object]:
        found = await request.parts.monitor.job(queue, job)
        if found is None:
            return {"error": "This task is over, and SAQ has forgotten it. Its job stands under /chat/jobs."}
        return {"job": found}

    @route(
        [*SHELLS, QUEUES, QUEUE, TASK, f"{TASK}/{{action:str}}", "/{path:path}"],
        http_method=[HttpMethod.POST, HttpMethod.PUT, HttpMethod.PATCH, HttpMethod.DELETE],
        status_code=405,
        opt=OPEN,
    )
    async def read_only(self) -> None:
        raise ReadOnly(
            "The monitor only shows: SAQ's Retry would run a running job twice. Jobs stand under /chat/jobs."
        )
