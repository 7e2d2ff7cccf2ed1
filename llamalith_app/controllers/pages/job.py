"""The page of one job: what was asked, what happened, what came of it; and the form that runs it again with changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from litestar import Controller, Response, get, post
from litestar.params import QueryParameter
from litestar.response import Redirect, Template

from llamalith_app.contracts.forms import AgainForm
from llamalith_app.contracts.jobs import MAX_ID, Job, JobRequest
from llamalith_app.contracts.parameters import NAMES, Parameters
from llamalith_app.controllers.jobs import JobIdInPath
from llamalith_app.controllers.pages import EXCERPT_CHARS
from llamalith_app.controllers.pages.redirects import see_other
from llamalith_app.errors import BadInput, JobOpen, NotFound, QueueFull, StorageUnavailable
from llamalith_app.guards.principal import BACKGROUND_PAGE, PAGE
from llamalith_app.jobs import timeline
from llamalith_app.jobs.submit import ForkPoint
from llamalith_app.store.jobs import reads
from llamalith_app.store.jobs.details import JobDetails, job_details
from llamalith_app.store.keys import Key
from llamalith_app.store.tables import Priority
from llamalith_app.web import charts, curl
from llamalith_app.web.html import page
from llamalith_app.web.problems import explained
from llamalith_app.web.request import AppRequest

MAX_SHOWN = 20_000
"""Characters of a text on the page; the whole stands in the JSON."""
FORM_PARAMETERS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed")
"""Numbers that the form has a field for, beside `stop`."""
OTHER_PARAMETERS = tuple(name for name in NAMES if name not in (*FORM_PARAMETERS, "stop"))
"""Stay as they are."""

BesideJob = Annotated[int | None, QueryParameter(ge=1, le=MAX_ID, description="A job to compare it with.")]


class JobPage(Controller):
    path = "/jobs/{job_id:str}"
    include_in_schema = False

    @get(opt=PAGE)
    async def job(self, request: AppRequest, job_id: JobIdInPath, beside: BesideJob = None) -> Template:
        details = await _details(request, job_id)
        other = None
        if beside is not None and beside != job_id:
            other = await request.parts.database.read(reads.job_by_id, request.principal.user_id, beside)
        job = details.job
        body = request_body(details)
        is_long = len(msgspec.json.encode(body)) > curl.MAX_BODY_BYTES
        raw = msgspec.json.encode(job)
        return page(
            request,
            "job",
            **_live(job, details),
            other=other,
            body_is_long=is_long,
            command=curl.command(
                "POST",
                f"{_origin(request)}/chat/api/jobs",
                None if is_long else body,
                file=f"job-{job_id}.json" if is_long else "",
            ),
            raw=msgspec.json.format(raw, indent=2).decode() if len(raw) <= MAX_SHOWN else None,
            n_raw=len(raw),
            before=details.before,
            has_request=details.is_of_one_prompt,
            has_history=details.parent_turn is not None,
            max_shown=MAX_SHOWN,
            parameters=_parameters_sent(job),
        )

    @get("/state", opt=BACKGROUND_PAGE)
    async def state(self, request: AppRequest, job_id: JobIdInPath) -> Template:
        """What of the page may change, for the script that polls it."""
        found = await request.parts.database.read(_job_state, request.principal.user_id, job_id)
        if found is None:
            raise NotFound("There is no such job.")
        await request.parts.live.add([found.job])
        return page(request, "_job", **_live(found.job, found), max_shown=MAX_SHOWN)

    @get("/request.json", opt=PAGE)
    async def request_json(self, request: AppRequest, job_id: JobIdInPath) -> Response[bytes]:
        """The body of the request that would make it again."""
        details = await _details(request, job_id)
        if not details.is_of_one_prompt:
            raise NotFound("This job was sent with a whole history, which no request of this API has.")
        body = curl.visible_json(request_body(details))
        return Response(
            body.encode(),
            media_type="application/json",
            headers={"Content-Disposition": f'attachment; filename="job-{job_id}.json"'},
        )

    @get("/again", opt=PAGE)
    async def change(self, request: AppRequest, job_id: JobIdInPath) -> Template:
        details = await _details(request, job_id)
        return _form_page(request, details, _prefilled(request, details.job))

    @post("/again", opt=PAGE, status_code=303)
    async def again(self, request: AppRequest, job_id: JobIdInPath) -> Redirect | Template:
        """Makes a job in a chat of its own, which begins with what stood before the old one. Leads to the new job, with
        the old one beside it. What cannot be used comes back with the reason."""
        details = await _details(request, job_id)
        form = await request.form_as(AgainForm)
        digest, parent = hashlib.sha256(msgspec.json.encode(form)).hexdigest(), details.parent_turn
        try:
            accepted = await request.parts.submissions.submit(
                request.principal,
                request.id,
                _changed(details, form),
                preceding=() if details.context else details.before,
                fork_of=None if parent is None else ForkPoint(details.job.conversation_id, parent),
                key=Key(request.principal.user_id, f"again:{form.once}:{digest}", digest) if form.once else None,
            )
        except (BadInput, NotFound, JobOpen, QueueFull, StorageUnavailable) as error:
            return _form_page(request, details, form, status_code=error.status, why=str(error))
        return see_other(f"/chat/jobs/{accepted.job_id}?beside={job_id}")


def request_body(details: JobDetails) -> dict[str, Any]:
    """What `POST /api/jobs` takes to make this job again."""
    job = details.job
    body: dict[str, Any] = {"content": job.user_input, "model": job.model}
    if details.parent_turn is not None:
        body |= {"conversation_id": job.conversation_id, "parent": details.parent_turn}
    if details.context:
        body["assistant_context"] = details.context
    for name in ("system_prompt", "grammar_name", "timeout_s", "queue_timeout_s"):
        if value := getattr(job, name):
            body[name] = value
    body |= {"priority": job.priority, "max_attempts": job.max_attempts}
    return body | _parameters_sent(job)


def _parameters_sent(job: Job) -> dict[str, Any]:
    return {} if job.parameters is None else msgspec.to_builtins(job.parameters)


def _origin(request: AppRequest) -> str:
    return request.parts.hosts.origin(request.scope["scheme"], request.headers.get("host", ""))


async def _details(request: AppRequest, job_id: int) -> JobDetails:
    details = await request.parts.database.read(job_details, request.principal.user_id, job_id)
    if details is None:
        raise NotFound("There is no such job.")
    await request.parts.live.add([details.job])
    return details


def _job_state(connection: Any, owner_id: int, job_id: int) -> JobDetails | None:
    """Without long texts: it is read again and again."""
    attempts = reads.attempts(connection, owner_id, job_id)
    if attempts is None:
        return None
    (job,) = reads.jobs_by_id(connection, [job_id], MAX_SHOWN + 1)
    return JobDetails(job, [], None, attempts)


def _live(job: Job, details: JobDetails) -> dict[str, Any]:
    """What the part of the page that keeps itself fresh shows."""
    now = datetime.now(UTC)
    steps = timeline.steps(job, details.attempts)
    return {
        "job": job,
        "steps": [(step, step.seconds(now), [(phase, _speed(job, phase)) for phase in step.phases]) for step in steps],
        "strip": _strip(steps, now),
        "priorities": [priority.name.lower() for priority in Priority],
        "excerpt_chars": EXCERPT_CHARS,
    }


def _speed(job: Job, phase: timeline.Phase) -> float | None:
    """Tokens a second. None: not known, as of a job of several attempts, whose counts are those of all together."""
    if job.status != "done" or job.attempt > 1 or not phase.seconds:
        return None
    if phase.kind == "reading":
        return ((job.prompt_tokens or 0) - (job.prompt_tokens_reused or 0)) / phase.seconds
    return (job.completion_tokens or 0) / phase.seconds if phase.kind == "writing" else None


def _strip(steps: list[timeline.Step], now: datetime) -> Any:
    pieces = [piece for step in steps for piece in _pieces(step, now)]
    waited_s = sum(step.seconds(now) for step in steps if step.attempt is None)
    ran_s = sum(step.seconds(now) for step in steps if step.attempt is not None)
    return charts.strip(
        "timeline",
        "How its time was spent",
        f"It waited {waited_s:.1f} s and ran {ran_s:.1f} s; the list says when.",
        pieces,
    )


def _pieces(step: timeline.Step, now: datetime) -> Iterator[charts.Piece]:
    left_s = step.seconds(now)
    if step.attempt is None:
        yield charts.Piece("waited", left_s, f"Waited: {left_s:.1f} s")
        return
    for phase in step.phases:
        if phase.is_over and phase.kind in ("loading", "reading"):
            words = "Loading the model" if phase.kind == "loading" else "Reading the prompt"
            yield charts.Piece(phase.kind, phase.seconds, f"{words}: {phase.seconds:.1f} s")
            left_s -= phase.seconds
    left_s = max(0.0, left_s)
    yield charts.Piece(step.attempt.outcome or "running", left_s, f"Attempt {step.attempt.attempt}: {left_s:.1f} s")


def _form_page(
    request: AppRequest, details: JobDetails, form: AgainForm, *, status_code: int = 200, why: str = ""
) -> Template:
    other = {name: value for name, value in _parameters_sent(details.job).items() if name in OTHER_PARAMETERS}
    return page(
        request,
        "again",
        status_code=status_code,
        job=details.job,
        form=form,
        why=why,
        models=request.parts.models,
        priorities=[priority.name.lower() for priority in Priority],
        numbers=FORM_PARAMETERS,
        unchanged=other | ({"grammar_name": details.job.grammar_name} if details.job.grammar_name else {}),
        max_shown=MAX_SHOWN,
    )


def _prefilled(request: AppRequest, job: Job) -> AgainForm:
    sent = job.parameters or Parameters()
    numbers = {name: getattr(sent, name) for name in FORM_PARAMETERS}
    stop = [sent.stop] if isinstance(sent.stop, str) else list(sent.stop or ())
    return AgainForm(
        content=job.user_input,
        model=job.model if job.model in request.parts.models else request.parts.models[0],
        system_prompt=job.system_prompt,
        priority="interactive",
        stop="\n".join(stop),
        **{
            name: "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
            for name, value in numbers.items()
        },
    )


def _changed(details: JobDetails, form: AgainForm) -> JobRequest:
    """The old job with what the form says instead. Raises BadInput."""
    job = details.job
    if not form.content.strip():
        raise BadInput("The prompt is empty: type one.")
    given: dict[str, Any] = {name: value for name in FORM_PARAMETERS if (value := getattr(form, name).strip())}
    if stop := [line for line in form.stop.split("\n") if line]:
        given["stop"] = stop
    try:
        parameters = msgspec.convert(given, Parameters, strict=False)
    except msgspec.ValidationError as error:
        raise BadInput(explained(str(error), Parameters)) from None
    kept = {name: getattr(job.parameters, name) for name in OTHER_PARAMETERS} if job.parameters is not None else {}
    return JobRequest(
        **(msgspec.structs.asdict(parameters) | kept),
        content=form.content,
        model=form.model,
        system_prompt=form.system_prompt,
        assistant_context=details.context or None,
        grammar_name=job.grammar_name,
        timeout_s=job.timeout_s,
        queue_timeout_s=job.queue_timeout_s,
        max_attempts=job.max_attempts,
        priority=form.priority,
    )
