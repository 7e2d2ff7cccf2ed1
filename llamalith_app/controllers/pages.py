"""The pages' addresses. Without a session each sends its visitor to the login page."""

from __future__ import annotations

from litestar import Response, get
from litestar.params import FromPath

from llamalith_app.guards.principal import OPEN


@get(
    [
        "/chat",
        "/chat/jobs",
        "/chat/jobs/rows",
        "/chat/conversations",
        "/chat/conversations/{conversation_id:str}",
    ],
    opt=OPEN,
    include_in_schema=False,
)
async def to_login(conversation_id: FromPath[str] = "") -> Response[dict[str, str]]:  # noqa: ARG001 - in the path
    return Response({"detail": "See Other"}, status_code=303, headers={"Location": "/chat/login"})
