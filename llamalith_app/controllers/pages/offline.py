"""What a browser keeps for when the server cannot be reached: a page that says so, and the script that shows it.

The script stands under /chat/, not under /chat/static/: a service worker rules only over the paths beside it and below.
"""

from __future__ import annotations

from litestar import Controller, Response, get
from litestar.response import Template

from llamalith_app.guards.principal import BACKGROUND, OPEN
from llamalith_app.web.html import ASSETS, MEDIA_TYPES, page
from llamalith_app.web.request import AppRequest


class OfflinePage(Controller):
    path = ""
    include_in_schema = False

    @get("/offline", opt=OPEN | BACKGROUND)
    async def offline(self, request: AppRequest) -> Template:
        return page(request, "offline", principal=None, csrf_token="", theme="", sidebar_is_closed=False)

    @get("/sw.js", opt=OPEN | BACKGROUND)
    async def service_worker(self) -> Response[bytes]:
        return Response(ASSETS["sw.js"], media_type=MEDIA_TYPES["js"], headers={"Cache-Control": "no-cache"})
