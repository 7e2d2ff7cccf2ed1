"""What the buttons of a conversation do with its branches: arrows, regenerate, edit, remove, delete, fork.

Each leads back to the conversation, at the turn that it was about.
"""

from __future__ import annotations

import contextlib
import hashlib

from litestar import Controller, post
from litestar.response import Redirect, Template

from llamalith_app.contracts.forms import JobForm, PromptForm, RegenerateForm, TurnForm
from llamalith_app.contracts.jobs import Job, Regenerate
from llamalith_app.controllers.jobs import JobIdInPath, answer_now, read_job
from llamalith_app.controllers.pages.conversation import TURNS_ON_PAGE
from llamalith_app.controllers.pages.draft import draft_page
from llamalith_app.controllers.pages.redirects import see_other
from llamalith_app.errors import JobStarted, NotFound, NotNow
from llamalith_app.guards.principal import PAGE
from llamalith_app.store import tree
from llamalith_app.store.keys import Key
from llamalith_app.store.tables import Status
from llamalith_app.web.html import conversation_url
from llamalith_app.web.request import AppRequest


class BranchForms(Controller):
    path = ""
    include_in_schema = False

    @post("/conversation/head", opt=PAGE, status_code=303)
    async def head(self, request: AppRequest) -> Redirect:
        """An arrow: the branch through that turn, at that turn."""
        form = await request.form_as(TurnForm)
        turn_id = int(form.turn_id)
        shown = await request.parts.branches.select(request.principal.user_id, form.conversation_id, turn_id)
        return await _at_turn(request, form.conversation_id, turn_id, shown.head)

    @post("/conversation/fork", opt=PAGE, status_code=303)
    async def fork(self, request: AppRequest) -> Redirect:
        form = await request.form_as(TurnForm)
        made = await request.parts.branches.fork(request.principal.user_id, form.conversation_id, int(form.turn_id))
        return see_other(conversation_url(made.conversation_id))

    @post("/conversation/turns/delete", opt=PAGE, status_code=303)
    async def delete(self, request: AppRequest) -> Redirect:
        """To the turn before it, or to what is shown instead."""
        form = await request.form_as(TurnForm)
        user_id, turn_id = request.principal.user_id, int(form.turn_id)
        before = await request.parts.database.read(tree.place, turn_id)
        shown = await request.parts.branches.delete_turn(user_id, form.conversation_id, turn_id)
        at = shown.head if before is None or before.parent_id is None else before.parent_id
        return await _at_turn(request, form.conversation_id, at, shown.head)

    @post("/jobs/{job_id:str}/regenerate", opt=PAGE, status_code=303)
    async def regenerate(self, request: AppRequest, job_id: JobIdInPath) -> Redirect:
        form = await request.form_as(RegenerateForm)
        user_id = request.principal.user_id
        # All turns of a page have the same `once`.
        digest = hashlib.sha256(f"{job_id} {form.model} {form.conversation_id}".encode()).hexdigest()
        accepted = await request.parts.submissions.regenerate(
            request.principal,
            request.id,
            job_id,
            Regenerate(model=form.model),
            conversation_id=form.conversation_id,
            key=Key(user_id, f"form:{form.once}:{digest}", digest) if form.once else None,
        )
        return see_other(f"{conversation_url(accepted.conversation_id)}#job-{accepted.job_id}")

    @post("/jobs/{job_id:str}/edit", opt=PAGE, status_code=303)
    async def edit(self, request: AppRequest, job_id: JobIdInPath) -> Redirect | Template:
        """A prompt that waits. Where it has been started, the text comes back as a draft of a prompt beside it."""
        form = await request.form_as(PromptForm)
        job = await read_job(request, job_id)
        try:
            await request.parts.branches.edit_prompt(request.principal.user_id, job_id, form.content)
        except JobStarted as error:
            draft = JobForm(
                content=form.content,
                model=job.model if job.model in request.parts.models else "",
                conversation_id=job.conversation_id,
                beside=str(job.turn_id),
            )
            why = (
                "The model has begun to answer the message as it was. Send this one instead of it, as another version."
            )
            return draft_page(request, draft, error.status, why)
        return see_other(_at_job(job))

    @post("/jobs/{job_id:str}/answer-now", opt=PAGE, status_code=303)
    async def answer_now(self, request: AppRequest, job_id: JobIdInPath) -> Redirect:
        """Where the job has ended meanwhile, there is nothing to do."""
        with contextlib.suppress(NotNow):
            await answer_now(request, job_id)
        return see_other(_at_job(await read_job(request, job_id)))

    @post("/jobs/{job_id:str}/remove", opt=PAGE, status_code=303)
    async def remove(self, request: AppRequest, job_id: JobIdInPath) -> Redirect:
        """Takes a prompt that waits out of its conversation. Where it has been started, it is only cancelled."""
        user_id, parts = request.principal.user_id, request.parts
        status = await parts.cancellations.cancel_job(user_id, job_id)
        if status is None:
            raise NotFound("There is no such job.")
        job = await read_job(request, job_id)
        if status is not Status.CANCELLED or job.attempt:
            return see_other(_at_job(job))
        await parts.branches.delete_turn(user_id, job.conversation_id, job.turn_id)
        return see_other(conversation_url(job.conversation_id))


def _at_job(job: Job) -> str:
    return f"{conversation_url(job.conversation_id)}#job-{job.id}"


async def _at_turn(request: AppRequest, public_id: str, turn_id: int, head: int) -> Redirect:
    """To the page of the conversation that has this turn: the newest, or one that begins with it."""
    url = conversation_url(public_id)
    at = await request.parts.database.read(tree.place, turn_id)
    last = await request.parts.database.read(tree.place, head)
    if at is None or last is None:
        return see_other(url)
    if last.depth - at.depth >= TURNS_ON_PAGE:
        url += f"{'&' if '?' in url else '?'}before={at.depth + TURNS_ON_PAGE}"
    return see_other(f"{url}#{f'turn-{at.depth}' if at.job_id is None else f'job-{at.job_id}'}")
