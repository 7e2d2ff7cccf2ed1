"""The request object that handlers get: the caller, the request id, and the services of the application (`Parts`).

Also parses JSON bodies and forms, and turns every way in which they can be malformed into BadInput or
UnsupportedMediaType. Does not know what a body means.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from litestar import Request
from litestar.datastructures import UploadFile
from litestar.exceptions import ClientException
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from litestar.params import HeaderParameter
from redis.asyncio import Redis

from llamalith_app.attachments.reader import AttachmentReader
from llamalith_app.contracts.principal import Principal
from llamalith_app.contracts.text import A_KEY, MAX_KEY
from llamalith_app.errors import BadInput, FileTooLarge, UnsupportedMediaType
from llamalith_app.guards.forms import form_fields
from llamalith_app.guards.hosts import Hosts
from llamalith_app.guards.passwords import Passwords
from llamalith_app.guards.sessions import Sessions
from llamalith_app.jobs.branches import Branches
from llamalith_app.jobs.bulk import BulkActions
from llamalith_app.jobs.calls import Calls
from llamalith_app.jobs.cancel import Cancellations
from llamalith_app.jobs.forecast import Forecasts
from llamalith_app.jobs.monitor import Monitor
from llamalith_app.jobs.submit import Submissions
from llamalith_app.settings.config import ModelConfig
from llamalith_app.store.database import Database
from llamalith_app.store.keys import Key
from llamalith_app.web.follow import Followers
from llamalith_app.web.live import Live
from llamalith_app.web.problems import explained
from llamalith_app.web.readiness import ReadinessCheck

Form = TypeVar("Form", bound=msgspec.Struct)

IdempotencyKey = Annotated[
    str | None,
    HeaderParameter(
        name="Idempotency-Key",
        title=A_KEY,
        min_length=1,
        max_length=MAX_KEY,
        pattern=r"^[\x21-\x7e]+$",
        description=f"Chosen by the client, new for each thing it wants made, {A_KEY}. Within"
        " 24 hours the same request under it gets the same answer and makes nothing more; another one is a 409.",
    ),
]

CHARSET = re.compile(r"(?:^|;)\s*charset\s*=\s*\"?([^\";]*[^\";\s])")
UTF_8 = ("utf-8", "utf8", "us-ascii", "ascii")
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MAX_BODY_BYTES = 16 * 1024 * 1024


class Parts(NamedTuple):
    """The services that handlers use.

    They are kept in the application's state. Litestar's dependency injection would start a task group for each request,
    which costs a tenth of the time of a submit.
    """

    database: Database
    submissions: Submissions
    branches: Branches
    cancellations: Cancellations
    bulk: BulkActions
    calls: Calls
    attachments: AttachmentReader
    live: Live
    followers: Followers
    readiness: ReadinessCheck
    sessions: Sessions
    passwords: Passwords
    monitor: Monitor
    models: tuple[str, ...]
    """The names of the configured models, in order."""
    model_configs: tuple[ModelConfig, ...]
    """The configurations of these models."""
    redis: Redis
    """Without retries."""
    record: str
    """The record's id, which names in Redis begin with."""
    forecasts: Forecasts
    max_wait: Mapping[int, timedelta]
    """How long a job of a class may wait, by priority."""
    hosts: Hosts
    restorable: timedelta
    """How long a deleted conversation can be restored."""


class AppRequest(Request[Any, Any, Any]):
    @property
    def id(self) -> str:
        """The request id, which `web/request_log.py` has set."""
        request_id: str = self.scope["request_id"]  # type: ignore[typeddict-item]
        return request_id

    @property
    def principal(self) -> Principal:
        """The caller. Set by the guard, so it exists on closed routes only."""
        principal: Principal = self.state.principal
        return principal

    @property
    def parts(self) -> Parts:
        parts: Parts = self.app.state.parts
        return parts

    async def json(self) -> Any:
        """The decoded JSON body. Raises UnsupportedMediaType, BadInput.

        Replaces Litestar's own, which answers 500 to deep nesting and invalid UTF-8, and accepts forms and text/plain.
        """
        media_type, _, charset = self.headers.get("content-type", "").lower().partition(";")
        if media_type.strip() != "application/json":
            raise UnsupportedMediaType(f"Content-Type: expected application/json, got {_quoted(media_type)}")
        if (found := CHARSET.search(charset)) and found[1] not in UTF_8:
            raise UnsupportedMediaType(f"Content-Type: expected charset=utf-8, got {_quoted(found[1])}")
        encoding = self.headers.get("content-encoding", "").strip().lower()
        if encoding not in ("", "identity"):
            raise UnsupportedMediaType(
                f"Content-Encoding: expected a body as it is (identity), got {_quoted(encoding)}"
            )
        body = (await self.body()).removeprefix(codecs.BOM_UTF8)
        try:
            return msgspec.json.decode(body)
        except RecursionError:
            raise BadInput("The body is nested too deeply.") from None
        except (UnicodeDecodeError, msgspec.DecodeError) as error:
            # JSON in UTF-8 contains no NUL byte.
            if body.startswith(UTF_16) or b"\0" in body[:4]:
                raise BadInput("The body is UTF-16 or UTF-32: expected UTF-8.") from None
            if isinstance(error, UnicodeDecodeError):
                raise BadInput("The body is not valid UTF-8.") from None
            raise BadInput(f"The body is not valid JSON: {error}") from None

    async def key(self, given: str | None) -> Key | None:
        """The caller's Idempotency-Key with a digest of this request; None if none was given."""
        if given is None:
            return None
        digest = hashlib.sha256()
        for part in (self.method, self.scope["path"], self.url.query):
            digest.update(part.encode() + b"\0")
        digest.update(await self.body())
        return Key(self.principal.user_id, given, digest.hexdigest())

    async def takes_only(self, *filters: str) -> None:
        """Raises BadInput if the query has a field that is not one of these filters, or if the body is not empty.

        For routes that act on all jobs that match: an ignored filter would make them act on more than was meant. A body
        of white space, or an empty JSON value, counts as empty.
        """
        if unknown := sorted(set(self.query_params) - set(filters)):
            these = f"these exist: {', '.join(filters)}" if filters else "there are none here"
            raise BadInput(f"{unknown[0][:80]}: unknown filter; {these}")
        if await self._has_content():
            instead = f"filters stand in the query: {', '.join(filters)}" if filters else "send none"
            raise BadInput(f"The body is not read here; {instead}")

    async def _has_content(self) -> bool:
        body = (await self.body()).strip()
        try:
            return bool(body) and bool(msgspec.json.decode(body))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return True

    async def file(self, name: str) -> bytes:
        """The file in this field of a form (`multipart/form-data`). Raises BadInput, FileTooLarge,
        UnsupportedMediaType."""
        if not self.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise UnsupportedMediaType("Content-Type: expected multipart/form-data")
        try:
            given = (await self.form()).get(name)
        except RequestEntityTooLarge:
            most = MAX_BODY_BYTES // 1_000_000
            raise FileTooLarge(f"The file is too large: at most {most} MB can be sent.") from None
        # An unknown charset, or a part without a name.
        except (ClientException, LookupError, UnicodeError, ValueError):
            raise BadInput("The body is no form with a file.") from None
        if not isinstance(given, UploadFile):
            raise BadInput(f"{name}: missing; expected a file")
        return await given.read()

    async def form_as(self, form: type[Form]) -> Form:
        """The form in the body as this type, with line ends as \\n. Raises BadInput, UnsupportedMediaType."""
        fields = {name: value.replace("\r\n", "\n") for name, value in (await form_fields(self)).items()}
        try:
            return msgspec.convert(fields, form)
        except msgspec.ValidationError as error:
            raise BadInput(explained(str(error), form)) from None


def _quoted(value: str) -> str:
    return f'"{value.strip()[:80]}"' if value.strip() else "none"
