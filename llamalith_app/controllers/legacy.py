"""The two oldest routes of the original application, kept for callers that still use them."""

from __future__ import annotations

from litestar import Controller, get, post
from litestar.params import JSONBody

from llamalith_app.contracts.conversations import LegacyStatus
from llamalith_app.contracts.jobs import JobRequest, LegacyAccepted, LegacySubmit
from llamalith_app.contracts.text import id_text
from llamalith_app.controllers.conversations import PathId
from llamalith_app.errors import BadInput
from llamalith_app.store import conversations
from llamalith_app.store.tables import Source
from llamalith_app.web.problems import TAKES_UNKNOWN
from llamalith_app.web.request import AppRequest, IdempotencyKey


class Legacy(Controller):
    path = ""
    tags = ("Legacy",)

    @post("/submit", status_code=200, summary="Queue a prompt, by the older names")
    async def submit(
        self, request: AppRequest, data: JSONBody[LegacySubmit], idempotency_key: IdempotencyKey = None
    ) -> LegacyAccepted:
        if not data.user_input.strip():
            raise BadInput("user_input is required")
        accepted = await request.parts.submissions.submit(
            request.principal,
            request.id,
            JobRequest(content=data.user_input, model=data.model, system_prompt=data.system_prompt),
            conversation_id=id_text(data.session_id),
            source=Source.LEGACY,
            key=await request.key(idempotency_key),
        )
        return LegacyAccepted(
            job_id=accepted.job_id or 0,
            conversation_id=accepted.conversation_id,
            created_new=accepted.created_new,
        )

    @get("/status/{conversation_id:str}", summary="Read the reply to the newest prompt", opt=TAKES_UNKNOWN)
    async def status(self, request: AppRequest, conversation_id: PathId) -> LegacyStatus:
        """`response` is null until there is a reply, and stays null if the newest job failed."""
        latest = await request.parts.database.read(conversations.latest, request.principal.user_id, conversation_id)
        job = latest.last_job
        return LegacyStatus(
            conversation_id=latest.conversation_id,
            exists=latest.exists,
            response=job.result if job is not None and job.status == "done" else None,
        )
