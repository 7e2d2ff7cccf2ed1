"""The form of a prompt when it is sent: accepted, or shown again as a draft with the reason and with what was typed."""

from __future__ import annotations

import hashlib
import re
import secrets
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Controller, Request, Response, post
from litestar.datastructures import Cookie
from litestar.response import Redirect, Template

from llamalith_app.contracts.forms import COMPARE_BOX, SHORT_FIELDS, FormAccepted, JobForm, ParameterFields
from llamalith_app.contracts.jobs import MAX_COMPARED, JobAccepted, JobRequest
from llamalith_app.contracts.parameters import Parameters, parameters_from_texts
from llamalith_app.contracts.principal import Principal
from llamalith_app.contracts.problems import Problem
from llamalith_app.contracts.text import MAX_NAME
from llamalith_app.controllers.pages.redirects import see_other
from llamalith_app.errors import BadInput, NotFound, QueueFull, SessionUnreadable, StaleForm, StorageUnavailable
from llamalith_app.guards.cookies import make_cookie
from llamalith_app.guards.forms import FILE_FIELD, form_fields
from llamalith_app.guards.principal import PAGE
from llamalith_app.store.keys import Key
from llamalith_app.store.tables import Source
from llamalith_app.web import html
from llamalith_app.web.html import conversation_url, page
from llamalith_app.web.problems import explained
from llamalith_app.web.request import AppRequest
from llamalith_app.web.visible import visible

MAX_SHOWN_CHARS = 4_000_000
"""Of a page that shows what was typed, as it stands in its HTML: one quotation mark is five characters there."""
TAKEN_COOKIE = "llamalith_taken"
TAKEN_COOKIE_S = 60


class DraftPage(Controller):
    path = "/jobs"
    include_in_schema = False

    @post(opt=PAGE, status_code=303)
    async def submit(self, request: AppRequest) -> Redirect | Template | Response[FormAccepted]:
        """Leads to the conversation, or answers a script where that is. A refused form comes back as a draft; a script
        has it still, and gets the reason alone."""
        accepted_types = request.headers.get("accept", "")
        is_shown = "text/html" in accepted_types or "application/json" not in accepted_types
        draft = await typed_draft(request)
        if draft is None:
            why = "The message is empty: type one."
            if not is_shown:
                raise BadInput(why)
            return draft_page(request, await request.form_as(JobForm), 400, why)
        if is_shown and (name := (await form_fields(request)).get(FILE_FIELD)):
            # The name alone was sent.
            why = f"{visible(name[:MAX_NAME])} is not in the message yet: choose it again, then press Attach."
            return draft_page(request, draft, 400, why)
        try:
            form = msgspec.structs.replace(await request.form_as(JobForm), compare=draft.compare)
            accepted = await _submit(request, form)
        except (BadInput, QueueFull, StorageUnavailable) as error:
            if not is_shown:
                raise
            return draft_page(request, draft, error.status, str(error))
        except NotFound as error:
            if not is_shown:
                raise
            # Sent again, it goes to the end of the conversation.
            draft = msgspec.structs.replace(draft, beside="")
            return draft_page(request, draft, error.status, f"{error}: what you edited was deleted meanwhile.")
        address = f"{conversation_url(accepted.conversation_id)}#job-{accepted.job_id}"
        cookies = _taken_cookies(request, form)
        if is_shown:
            return see_other(address, *cookies)
        made = FormAccepted(url=address, once=secrets.token_urlsafe(16))
        return Response(made, status_code=200, cookies=cookies)


async def _submit(request: AppRequest, form: JobForm) -> JobAccepted:
    """The first of its jobs: there is one for each model. Raises what `Submissions.submit` raises."""
    principal, submissions = request.principal, request.parts.submissions
    prompt = JobRequest(
        content=form.content,
        model=form.model,
        system_prompt=form.system_prompt,
        priority="interactive",
        **parameters_in(form),
    )
    where: dict[str, Any] = {
        "conversation_id": form.conversation_id,
        "source": Source.PAGE,
        "keeps_system_prompt": form.system_prompt == form.system_prompt_was,
        "beside": int(form.beside) if form.beside else None,
        "seen": int(form.seen) if form.seen else None,
        "key": _idempotency_key(principal.user_id, form),
    }
    chosen = form.model.strip() or request.parts.models[0]
    models = list(dict.fromkeys([chosen, *form.compare.split("\n")])) if form.compare else [chosen]
    if len(models) == 1:
        return await submissions.submit(principal, request.id, prompt, **where)
    if len(models) > MAX_COMPARED:
        raise BadInput(f"A message can be sent to {MAX_COMPARED} models at once: choose fewer of them.")
    return (await submissions.compare(principal, request.id, prompt, models, **where)).jobs[0]


def parameters_in(fields: ParameterFields) -> dict[str, Any]:
    """The parameters that a form sets, by name. Raises BadInput."""
    try:
        given = parameters_from_texts({name: getattr(fields, name) for name in ParameterFields.__struct_fields__})
    except msgspec.ValidationError as error:
        raise BadInput(explained(str(error), Parameters)) from None
    return msgspec.structs.asdict(given)


async def typed_draft(request: AppRequest) -> JobForm | None:
    """The prompt's form in the body as it came, valid or not; None: it has no message. Ids and names that are longer
    than any are left out: no page of ours made them, and all of the form is shown again."""
    return draft_in(await form_fields(request))


def draft_in(fields: dict[str, str]) -> JobForm | None:
    """The same, of fields that were read before."""
    form = form_in(fields)
    return form if form.content.strip() else None


def form_in(fields: dict[str, str]) -> JobForm:
    """The same, with or without a message."""
    kept = {name: fields.get(name, "").replace("\r\n", "\n") for name in JobForm.__struct_fields__}
    boxes = [name.removeprefix(COMPARE_BOX) for name in fields if name.startswith(COMPARE_BOX)]
    kept["compare"] = "\n".join(filter(None, [kept["compare"], *boxes]))
    kept |= {name: "" for name, limit in SHORT_FIELDS.items() if len(kept[name]) > limit}
    return JobForm(**kept)


def draft_page(request: Request[Any, Any, Any], draft: JobForm, status: int, why: str) -> Template:
    """What was typed, in a form that can be sent again; or only why not, where that would be too long a page."""
    if sum(map(_shown_chars, (draft.content, draft.system_prompt, draft.system_prompt_was))) > MAX_SHOWN_CHARS:
        detail = f"{why.rstrip('.')}. It is too long to be shown here again: go back, your browser still has it."
        request_id = str(request.scope.get("request_id", ""))
        problem = Problem(type="about:blank", title="Not sent yet", status=status, detail=detail, request_id=request_id)
        return page(request, "error", status_code=status, problem=problem, phrase=HTTPStatus(status).phrase)
    return page(request, "draft", status_code=status, form=draft, why=why, models=request.app.state.parts.models)


def answer_stale_form(request: Request[Any, Any, Any], error: StaleForm) -> Response[Any]:
    """A form without a good CSRF token is shown again with one, and with what was typed."""
    session = request.state.get("session")
    draft = draft_in(error.fields)
    if session is None or draft is None:
        return html.answer_own_error(request, error)
    request.state.principal = Principal(session.user_id, "session", session.csrf_token)
    return draft_page(request, draft, error.status, "This form was out of date and was not sent. Look it over.")


def answer_session_unreadable(request: Request[Any, Any, Any], error: SessionUnreadable) -> Response[Any] | Template:
    """What was typed stays in a form that can be sent again."""
    draft = draft_in(error.fields)
    return (
        html.answer_own_error(request, error) if draft is None else draft_page(request, draft, error.status, str(error))
    )


def _shown_chars(text: str) -> int:
    return len(text) + 4 * sum(map(text.count, "&<>\"'"))


def _taken_cookies(request: AppRequest, form: JobForm) -> list[Cookie]:
    """Tells the page that shows the job that this form has arrived, so that its script forgets the draft."""
    if not re.fullmatch(r"[\w-]+", form.once, re.ASCII):
        return []
    # For the page's script to read.
    return [
        make_cookie(request, TAKEN_COOKIE, form.once, TAKEN_COOKIE_S, path="/chat", httponly=False, samesite="strict")
    ]


def _idempotency_key(owner_id: int, form: JobForm) -> Key | None:
    """Of this form with this text: sent again, by an impatient hand or by a browser that got no answer, it makes
    nothing more; with another text it is another one."""
    if not form.once:
        return None
    sent = msgspec.json.encode(msgspec.structs.replace(form, once="", seen="", system_prompt_was=""))
    digest = hashlib.sha256(sent).hexdigest()
    return Key(owner_id, f"form:{form.once}:{digest}", digest)
