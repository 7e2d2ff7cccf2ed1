"""Health probes, open to everybody and cheap: whether the process is alive, and whether jobs can run."""

from __future__ import annotations

from litestar import Controller, Response, get
from litestar.openapi.datastructures import ResponseSpec

from llamalith_app.contracts.health import Health, Readiness
from llamalith_app.guards.principal import BACKGROUND, OPEN
from llamalith_app.web.request import AppRequest

NOT_READY = ResponseSpec(
    Readiness, description="Not all parts are there; the body tells which.", generate_examples=False
)


class Probes(Controller):
    path = ""
    opt = OPEN | BACKGROUND
    tags = ("Health",)

    @get("/healthz", summary="Is the process there")
    async def healthz(self) -> Health:
        return Health()

    @get("/readyz", summary="Can it do its work", responses={503: NOT_READY})
    async def readyz(self, request: AppRequest) -> Response[Readiness]:
        """503 tells which part is missing."""
        readiness = await request.parts.readiness.check()
        return Response(readiness, status_code=200 if readiness.ready else 503)
