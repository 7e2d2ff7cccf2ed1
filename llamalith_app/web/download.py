"""A conversation as a file to save: as JSON, which can be imported again, or as Markdown to read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal
from urllib.parse import quote

import msgspec
from litestar import Response

from llamalith_app.contracts.export import ConversationExport, ExportedTurn
from llamalith_app.contracts.text import MAX_NAME
from llamalith_app.errors import BadInput
from llamalith_app.store import transfer
from llamalith_app.store.conversation_list import first_words
from llamalith_app.web.problems import explained

ExportFormat = Literal["json", "md"]
_NOT_IN_NAMES = re.compile(r"[^\w .,()+-]+")
_ASCII_ONLY = re.compile(r"[^A-Za-z0-9 .,()+-]+")


def answer(exported: ConversationExport, wanted: ExportFormat) -> Response[Any]:
    """The file as an answer that browsers save under the conversation's title."""
    if wanted == "md":
        body, media_type = markdown(exported).encode(), "text/markdown"
    else:
        body, media_type = msgspec.json.format(msgspec.json.encode(exported), indent=1), "application/json"
    name = " ".join(_NOT_IN_NAMES.sub(" ", title(exported)).split()).strip(" .")[:MAX_NAME] or "conversation"
    plain = _ASCII_ONLY.sub("_", name)
    disposition = f"attachment; filename=\"{plain}.{wanted}\"; filename*=UTF-8''{quote(name, safe='')}.{wanted}"
    return Response(body, media_type=media_type, headers={"Content-Disposition": disposition})


def title(exported: ConversationExport) -> str:
    """The title, or else the first words of the first prompt."""
    prompts = (message.content for turn in exported.turns for message in turn.messages if message.role == "user")
    return exported.title or first_words(next(prompts, "")) or "Conversation"


def markdown(exported: ConversationExport) -> str:
    """The branch that people see. Texts stand there as they were written."""
    return "\n\n".join([f"# {title(exported)}", *_sections(transfer.path(exported))]) + "\n"


def _sections(turns: list[ExportedTurn]) -> Iterator[str]:
    for turn in turns:
        for message in turn.messages:
            if message.role == "system":
                yield _quoted("System prompt:", message.content)
            else:
                said_by = turn.model if message.is_reply else None
                words = {"user": "You", "assistant": "Assistant", "tool": "Tool"}[message.role]
                yield f"## {said_by or words}"
                if message.thinking:
                    yield _quoted("Thinking:", message.thinking)
                yield message.content


def _quoted(words: str, text: str) -> str:
    lines = "\n".join(f"> {line}".rstrip() for line in text.splitlines())
    return f"> {words}\n>\n{lines}"


def parsed(body: bytes) -> ConversationExport:
    """The conversation in a file. Raises BadInput."""
    try:
        return msgspec.json.decode(body.removeprefix(b"\xef\xbb\xbf"), type=ConversationExport)
    except RecursionError:
        raise BadInput("The file is nested too deeply.") from None
    except msgspec.ValidationError as error:
        raise BadInput(explained(str(error), ConversationExport).replace("The body", "The file", 1)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise BadInput("The file is no JSON: expected one that was exported here.") from None
