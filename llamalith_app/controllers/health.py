"""Probes, open to everybody and cheap: is the process there, and can it do its work."""

from __future__ import annotations

from litestar import Controller, HttpMethod, Response, route

from llamalith_app.contracts.health import Health, Readiness
from llamalith_app.controllers.request import AppRequest
from llamalith_app.guards.principal import OPEN

GET_AND_HEAD = [HttpMethod.GET, HttpMethod.HEAD]


class Probes(Controller):
    path = ""
    opt = OPEN
    tags = ("Health",)

    @route("/healthz", http_method=GET_AND_HEAD, status_code=200, summary="Is the process there")
    async def healthz(self) -> Health:
        return Health()

    @route("/readyz", http_method=GET_AND_HEAD, status_code=200, summary="Can it do its work")
    async def readyz(self, request: AppRequest) -> Response[Readiness]:
        """503 tells which part is missing."""
        readiness = await request.parts.readings.read()
        return Response(readiness, status_code=200 if readiness.ready else 503)
