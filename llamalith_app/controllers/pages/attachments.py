"""The text of a file for a message: for the page's script as JSON, without one in the message's form.

Nothing is stored; the file is sent with the form and comes back as text.
"""

from __future__ import annotations

import re
from http import HTTPStatus

import msgspec
from litestar import Controller, Response, post
from litestar.response import Template

from llamalith_app.contracts.attachments import Attachment
from llamalith_app.contracts.text import MAX_NAME
from llamalith_app.controllers.pages.draft import draft_page, form_in
from llamalith_app.errors import BadInput, FileTooLarge, ReaderBusy
from llamalith_app.guards.forms import FileForm, file_form
from llamalith_app.guards.principal import PAGE
from llamalith_app.web import html
from llamalith_app.web.request import AppRequest
from llamalith_app.web.visible import visible


class AttachmentsPage(Controller):
    path = "/attachments"
    include_in_schema = False

    @post(opt=PAGE, status_code=200)
    async def attach(self, request: AppRequest) -> Response[Attachment] | Template:
        """The field `file` of a form, as an Attachment. A browser without a script gets the form of the message again,
        with the file at the end of what was typed."""
        sent = await file_form(request)
        if not html.wants_html(request):
            return Response(await _read(request, sent))
        draft = form_in(sent.fields)
        try:
            read = await _read(request, sent)
        except (BadInput, FileTooLarge, ReaderBusy) as error:
            return draft_page(request, draft, error.status, str(error))
        content = "\n\n".join(filter(None, [draft.content.rstrip(), block(read.name, read.text)]))
        why = " ".join(filter(None, [f"{read.name} is in the message now. Nothing has been sent yet.", read.note]))
        return draft_page(request, msgspec.structs.replace(draft, content=content), HTTPStatus.OK, why)


async def _read(request: AppRequest, sent: FileForm) -> Attachment:
    if not sent.name and not sent.data:
        raise BadInput("file: missing; choose one.")
    extract = await request.parts.attachments.read(sent.name, sent.data)
    return Attachment(
        name=shown_name(sent.name),
        text=extract.text,
        pages=extract.pages,
        truncated=bool(extract.missing),
        note=extract.missing,
    )


def shown_name(given: str) -> str:
    """A file's name without its folders, with marks for what is invisible, and without backticks, which would begin a
    block of code where it stands in a message."""
    name = re.split(r"[/\\]", given)[-1].replace("`", "'").strip()
    return visible(name[:MAX_NAME]) or "file"


def block(name: str, text: str) -> str:
    """The file as it stands in a message: its name, and its text in a fence that nothing in the text can end.

    The page's script does the same (`static/attachments.js`)."""
    fence = "`" * max([2, *(len(run) for run in re.findall("`{3,}", text))]) + "`"
    ending = re.search(r"\.([a-z0-9]{1,8})\Z", name.lower(), re.ASCII)
    language = "" if ending is None or ending[1] == "pdf" else ending[1]
    return f"{name}\n{fence}{language}\n{text.removesuffix(chr(10))}\n{fence}"
