"""The one error tree, and the one table from an error to what HTTP says of it.

Every error carries a stable `type` (the last part of the problem's URI), a status and a sentence for people.
Knows nothing of Litestar: `controllers/problems.py` turns these into answers.
"""

from __future__ import annotations


class LlamalithError(Exception):
    """The reason, as a sentence for the person who can do something about it."""

    status = 500
    type = "internal"
    title = "Internal error"
    retry_after_s: int | None = None


class ConfigError(LlamalithError):
    """The configuration cannot be used; one problem a line."""

    type = "config"
    title = "Configuration error"

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class BadInput(LlamalithError):
    status = 400
    type = "bad-input"
    title = "Bad input"


class NotAuthenticated(LlamalithError):
    status = 401
    type = "not-authenticated"
    title = "Not authenticated"


class LoginNeeded(LlamalithError):
    """A page without a session: its visitor goes to the login."""

    status = 303
    type = "login-needed"
    title = "See Other"

    def __init__(self, fields: dict[str, str] | None) -> None:
        super().__init__("Your session has ended, or never began.")
        self.fields = fields
        """What was typed into the form that came without a session; None: too much to be read before a login."""


class CrossSite(LlamalithError):
    """Sent by another origin than ours, with the cookies of somebody who may not know."""

    status = 403
    type = "cross-site"
    title = "Cross-site request"


class StaleForm(LlamalithError):
    """Nothing proves that one of our pages sent it: no origin was told and the CSRF token is missing or another's."""

    status = 403
    type = "csrf-token"
    title = "Out of date"

    def __init__(self, fields: dict[str, str]) -> None:
        super().__init__(
            "The CSRF token is missing or out of date: send the form's csrf_token, or X-CSRF-Token, of this session."
        )
        self.fields = fields


class TooManyLogins(LlamalithError):
    status = 429
    type = "too-many-logins"
    title = "Too many attempts"

    def __init__(self, wait_s: int) -> None:
        super().__init__(f"Too many attempts. Try again in {wait_s} second{'' if wait_s == 1 else 's'}.")
        self.retry_after_s = wait_s


class QueueFull(LlamalithError):
    """Its owner has as many jobs waiting as are allowed."""

    status = 429
    type = "queue-full"
    title = "Queue full"

    def __init__(self, max_queued: int, wait_s: int) -> None:
        super().__init__(
            f"{max_queued} jobs are waiting already, and no more are taken (max_queued)."
            f" Try again in {wait_s} second{'' if wait_s == 1 else 's'}; nothing was stored."
        )
        self.retry_after_s = wait_s


class KeyReused(LlamalithError):
    status = 409
    type = "idempotency-key-reused"
    title = "Idempotency-Key reused"

    def __init__(self, key: str) -> None:
        super().__init__(
            f"Idempotency-Key {key}: another request was sent under it within the last 24 hours. Send a new key with a"
            " new request; nothing was stored."
        )


class NotRetryable(LlamalithError):
    """Only what ended without a reply can be tried again."""

    status = 409
    type = "not-retryable"
    title = "Not retryable"


class ReadOnly(LlamalithError):
    status = 405
    type = "method-not-allowed"
    title = "Method not allowed"


class NotFound(LlamalithError):
    status = 404
    type = "not-found"
    title = "Not found"


class UnsupportedMediaType(LlamalithError):
    status = 415
    type = "unsupported-media-type"
    title = "Unsupported media type"


class StorageUnavailable(LlamalithError):
    """The database cannot take a write now: locked past the deadline, full, read-only or failing."""

    status = 503
    type = "storage-unavailable"
    title = "Storage unavailable"
    retry_after_s = 5


class SessionUnreadable(StorageUnavailable):
    """A form came while nobody could tell whose session it was."""

    def __init__(self, reason: str, fields: dict[str, str]) -> None:
        super().__init__(reason)
        self.fields = fields


class ValidatorBusy(LlamalithError):
    """Schemas of others are judged, and this one's turn did not come in time."""

    status = 503
    type = "schema-judge-busy"
    title = "Busy"
    retry_after_s = 5


class RedisUnavailable(LlamalithError):
    """Only raised where Redis itself is what was asked for; everything else does without it."""

    type = "redis-unavailable"
    title = "Redis unavailable"
