"""The pages of a session: dashboard, jobs, conversations, and the parts of them that keep themselves fresh.

Thin: what is shown is read from the record and from live progress, a prompt goes the way of every prompt.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Literal

import msgspec
from litestar import Controller, get, post
from litestar.datastructures import Cookie
from litestar.params import FromQuery, QueryParameter
from litestar.response import Redirect, Template

from llamalith_app.contracts.forms import JobForm
from llamalith_app.contracts.jobs import Job, StatusWord
from llamalith_app.controllers.conversations import PathId
from llamalith_app.controllers.jobs import MAX_ID, JobIdInPath
from llamalith_app.controllers.login import came_from, draft_page, see, typed
from llamalith_app.controllers.models import engines
from llamalith_app.errors import BadInput, NotFound, QueueFull, StorageUnavailable
from llamalith_app.guards.cookies import make_cookie
from llamalith_app.guards.principal import BACKGROUND_PAGE, PAGE
from llamalith_app.store import conversations, job_reads
from llamalith_app.store.keys import Key
from llamalith_app.store.tables import Status
from llamalith_app.web.html import conversation_url, page
from llamalith_app.web.request import AppRequest

EXCERPT_CHARS = 300
"""Of a text in a list."""
NEWEST_ON_DASHBOARD = 10
JOBS_ON_PAGE = 50
CONVERSATIONS_ON_PAGE = 50
TURNS_ON_PAGE = 30

StatusFilter = StatusWord | Literal[""]
Limit = Annotated[int, QueryParameter(ge=1, le=JOBS_ON_PAGE)]
Before = Annotated[int | None, QueryParameter(ge=1, le=MAX_ID)]
BeforeTurn = Annotated[int | None, QueryParameter(ge=0, le=MAX_ID)]
KnownTurns = Annotated[int, QueryParameter(ge=0, le=MAX_ID, description="The page has the turns before this one.")]
FromTurn = Annotated[int | None, QueryParameter(name="from", ge=0, le=MAX_ID)]
PageNumber = Annotated[int, QueryParameter(name="page", ge=1, le=100_000)]
QueryId = Annotated[str, QueryParameter(name="id", min_length=1, max_length=200)]


class Pages(Controller):
    path = ""
    include_in_schema = False

    @get("/", opt=PAGE)
    async def dashboard(self, request: AppRequest) -> Template:
        found = await _newest(request, "", NEWEST_ON_DASHBOARD, None)
        return page(
            request,
            "dashboard",
            jobs=found,
            models=request.parts.models,
            engines=await engines(request.parts),
            form=JobForm(model=found[0].model if found else ""),
            status="",
            before=None,
            limit=NEWEST_ON_DASHBOARD,
        )

    @get("/jobs", opt=PAGE)
    async def jobs(self, request: AppRequest, status: FromQuery[StatusFilter] = "", before: Before = None) -> Template:
        found = await _newest(request, status, JOBS_ON_PAGE, before)
        return page(
            request, "jobs", jobs=found, statuses=list(Status), status=status, before=before, limit=JOBS_ON_PAGE
        )

    @get("/jobs/rows", opt=BACKGROUND_PAGE)
    async def rows(
        self,
        request: AppRequest,
        status: FromQuery[StatusFilter] = "",
        before: Before = None,
        limit: Limit = JOBS_ON_PAGE,
    ) -> Template:
        found = await _newest(request, status, limit, before)
        shown = await engines(request.parts) if limit == NEWEST_ON_DASHBOARD else []
        return page(request, "_rows", jobs=found, engines=shown, status=status, before=before, limit=limit)

    @post("/jobs", opt=PAGE, status_code=303)
    async def submit(self, request: AppRequest) -> Redirect | Template:
        """From the dashboard back to it, from a conversation back to that; what is wrong is told beside what was
        typed."""
        draft = await typed(request)
        if draft is None:
            return draft_page(request, await request.form_as(JobForm), 400, "The message is empty: type one.")
        try:
            form = await request.form_as(JobForm)
            accepted = await request.parts.submissions.submit(
                request.principal.user_id,
                request.id,
                content=form.content,
                conversation_id=form.conversation_id,
                model=form.model,
                system_prompt=form.system_prompt,
                keeps_system_prompt=form.system_prompt == form.system_prompt_was,
                priority="interactive",
                key=_key(request.principal.user_id, form),
            )
        except (BadInput, QueueFull, StorageUnavailable) as error:
            return draft_page(request, draft, error.status, str(error))
        home = "/chat/" if accepted.created_new else conversation_url(accepted.conversation_id)
        return see(f"{home}#job-{accepted.job_id}", *_taken(request, form))

    @post("/jobs/{job_id:str}/cancel", opt=PAGE, status_code=303)
    async def cancel(self, request: AppRequest, job_id: JobIdInPath) -> Redirect:
        if await request.parts.cancellations.cancel_job(request.principal.user_id, job_id) is None:
            raise NotFound("There is no such job.")
        return see(f"{came_from(request)}#job-{job_id}")

    @post("/jobs/{job_id:str}/retry", opt=PAGE, status_code=303)
    async def retry(self, request: AppRequest, job_id: JobIdInPath) -> Redirect:
        """Back to where it was asked, at the new job; where a job was tried again before, at that one."""
        again = await request.parts.submissions.retry(request.principal.user_id, request.id, job_id)
        return see(f"{came_from(request)}#job-{again.job_id}")

    @post("/jobs/cancel", opt=PAGE, status_code=303)
    async def cancel_queued(self, request: AppRequest) -> Redirect:
        await request.parts.cancellations.cancel_matching(request.principal.user_id, {Status.QUEUED})
        return see("/chat/jobs?status=queued")

    @get("/conversations", opt=PAGE)
    async def conversations(self, request: AppRequest, number: PageNumber = 1) -> Template:
        return await _conversations(request, "conversations", number)

    @get("/conversation/list", opt=BACKGROUND_PAGE)
    async def conversation_list(self, request: AppRequest, number: PageNumber = 1) -> Template:
        return await _conversations(request, "_conversations", number)

    @get("/conversations/{conversation_id:str}", opt=PAGE)
    async def conversation(self, request: AppRequest, conversation_id: PathId, before: BeforeTurn = None) -> Template:
        return await _conversation(request, conversation_id, before)

    @get("/conversation", opt=PAGE)
    async def conversation_by_query(
        self, request: AppRequest, public_id: QueryId, before: BeforeTurn = None
    ) -> Template:
        """For ids that cannot stand in a path."""
        return await _conversation(request, public_id, before)

    @get("/conversation/turns", opt=BACKGROUND_PAGE)
    async def turns(
        self, request: AppRequest, public_id: QueryId, first: FromTurn = None, known: KnownTurns = 0
    ) -> Template:
        thread = await _thread(request, public_id, first=first)
        return page(request, "_turns", thread=thread, public_id=public_id, is_newest=True, known=known)


def _taken(request: AppRequest, form: JobForm) -> list[Cookie]:
    """Says to the page that shows the job that what was typed into this form has arrived."""
    if not re.fullmatch(r"[\w-]+", form.once, re.ASCII):
        return []
    # For the page's script to read.
    return [make_cookie(request, "llamalith_taken", form.once, 60, path="/chat", httponly=False, samesite="strict")]


def _key(owner_id: int, form: JobForm) -> Key | None:
    """Of this form with this text: sent again, by an impatient hand or by a browser that got no answer, it makes
    nothing more; with another text it is another one."""
    if not form.once:
        return None
    said = msgspec.json.encode((form.content, form.model, form.system_prompt, form.conversation_id))
    digest = hashlib.sha256(said).hexdigest()
    return Key(owner_id, f"form:{form.once}:{digest}", digest)


async def _conversation(request: AppRequest, public_id: str, before: int | None) -> Template:
    thread = await _thread(request, public_id, before=before)
    newest = next((turn.job for turn in reversed(thread.turns) if turn.job is not None), None)
    form = JobForm(
        model=newest.model if newest is not None and newest.model in request.parts.models else "",
        system_prompt=thread.system_prompt,
        system_prompt_was=thread.system_prompt,
        conversation_id=public_id,
    )
    return page(
        request,
        "conversation",
        thread=thread,
        public_id=public_id,
        is_newest=before is None,
        known=0,
        form=form,
        models=request.parts.models,
    )


async def _conversations(request: AppRequest, template: str, number: int) -> Template:
    found = await request.parts.database.read(
        conversations.newest,
        request.principal.user_id,
        limit=CONVERSATIONS_ON_PAGE + 1,
        offset=(number - 1) * CONVERSATIONS_ON_PAGE,
        max_text=EXCERPT_CHARS,
    )
    shown, more = found[:CONVERSATIONS_ON_PAGE], len(found) > CONVERSATIONS_ON_PAGE
    return page(request, template, conversations=shown, number=number, more=more)


async def _newest(request: AppRequest, status: str, limit: int, before: int | None) -> list[Job]:
    found = await request.parts.database.read(
        job_reads.newest,
        request.principal.user_id,
        limit=limit,
        status=status or None,
        before=before,
        max_text=EXCERPT_CHARS,
    )
    await request.parts.live.add(found)
    return found


async def _thread(
    request: AppRequest, public_id: str, *, first: int | None = None, before: int | None = None
) -> conversations.Thread:
    thread = await request.parts.database.read(
        conversations.thread,
        request.principal.user_id,
        public_id,
        limit=TURNS_ON_PAGE,
        max_text=EXCERPT_CHARS,
        first=first,
        before=before,
    )
    if thread is None:
        raise NotFound("There is no such conversation.")
    await request.parts.live.add([turn.job for turn in thread.turns if turn.job is not None])
    return thread
