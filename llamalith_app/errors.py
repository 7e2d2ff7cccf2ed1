"""The tree of our own errors. Each class has the HTTP status, the stable `type` and the title of its answer.

The message of an error is a sentence for people. `type` is the last part of the URI in a problem's `type` field. Knows
nothing about Litestar: `web/problems.py` turns these errors into answers.
"""

from __future__ import annotations


class LlamalithError(Exception):
    """Base class. The message is a sentence for the person who can fix the cause."""

    status = 500
    type = "internal"
    title = "Internal error"
    retry_after_s: int | None = None


class ConfigError(LlamalithError):
    """The configuration cannot be used. `problems` has one line for each problem."""

    type = "config"
    title = "Configuration error"

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class BadInput(LlamalithError):
    status = 400
    type = "bad-input"
    title = "Bad input"


class UnknownModel(LlamalithError):
    """An OpenAI client named a model that is not offered."""

    status = 404
    type = "model-not-found"
    title = "Unknown model"


class NoPreviousResponse(LlamalithError):
    """An OpenAI client goes on from a response that is not there, or that ended without a reply."""

    status = 400
    type = "previous-response-not-found"
    title = "No previous response"


class Ending(LlamalithError):
    """This process ends before it knows the answer. The job is stored: the same request finds it again."""

    status = 503
    type = "ending"
    title = "Ending"
    retry_after_s = 1


class NotAuthenticated(LlamalithError):
    status = 401
    type = "not-authenticated"
    title = "Not authenticated"


class LoginNeeded(LlamalithError):
    """A page was requested without a session; the visitor is redirected to the login."""

    status = 303
    type = "login-needed"
    title = "See Other"

    def __init__(self, fields: dict[str, str] | None) -> None:
        super().__init__("Your session has ended, or never began.")
        self.fields = fields
        """The fields of the form that came without a session; None if it was too long to be read before a login."""


class CrossSite(LlamalithError):
    """Another site's page sent this request with a user's cookies, perhaps without the user knowing."""

    status = 403
    type = "cross-site"
    title = "Cross-site request"


class StaleForm(LlamalithError):
    """The request names no origin, and its CSRF token is missing or belongs to another session."""

    status = 403
    type = "csrf-token"
    title = "Out of date"

    def __init__(self, fields: dict[str, str]) -> None:
        super().__init__(
            "The CSRF token is missing or out of date: send the form's csrf_token, or X-CSRF-Token, of this session."
        )
        self.fields = fields


class TooManyLogins(LlamalithError):
    """The login throttle refuses an attempt; the next one is allowed after `retry_after_s` seconds."""

    status = 429
    type = "too-many-logins"
    title = "Too many attempts"

    def __init__(self, wait_s: int) -> None:
        super().__init__(f"Too many attempts. Try again in {wait_s} second{'' if wait_s == 1 else 's'}.")
        self.retry_after_s = wait_s


class QueueFull(LlamalithError):
    """The owner already has `max_queued` jobs waiting."""

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
    """An Idempotency-Key came again with a different request."""

    status = 409
    type = "idempotency-key-reused"
    title = "Idempotency-Key reused"

    def __init__(self, key: str) -> None:
        super().__init__(
            f"Idempotency-Key {key}: another request was sent under it within the last 24 hours. Send a new key with a"
            " new request; nothing was stored."
        )


class NotRetryable(LlamalithError):
    """The job cannot be retried: it has not ended, or it ended with a reply."""

    status = 409
    type = "not-retryable"
    title = "Not retryable"


class NotQueued(LlamalithError):
    """The job cannot be changed: it was started, or it has ended."""

    status = 409
    type = "not-queued"
    title = "Not queued"


class NotNow(LlamalithError):
    """It cannot be done as things stand; the message says why."""

    status = 409
    type = "not-now"
    title = "Not now"


class JobOpen(LlamalithError):
    """What was asked for has to wait until a job has ended."""

    status = 409
    type = "job-open"
    title = "Job is open"


class JobStarted(LlamalithError):
    """The prompt of a job cannot be changed any more: it has been started, or has ended."""

    status = 409
    type = "job-started"
    title = "Job was started"


class TurnInUse(LlamalithError):
    """The turn holds nothing but a system prompt that is in force for later turns."""

    status = 409
    type = "turn-in-use"
    title = "Turn in use"


class ConversationExists(LlamalithError):
    """A new or restored conversation was to get an id that is taken."""

    status = 409
    type = "conversation-exists"
    title = "Conversation exists"


class ReadOnly(LlamalithError):
    """A write to a resource that can only be read."""

    status = 405
    type = "method-not-allowed"
    title = "Method not allowed"


class NotFound(LlamalithError):
    status = 404
    type = "not-found"
    title = "Not found"


class FileTooLarge(LlamalithError):
    """A file is larger than one that can be attached."""

    status = 413
    type = "file-too-large"
    title = "File too large"


class UnsupportedMediaType(LlamalithError):
    status = 415
    type = "unsupported-media-type"
    title = "Unsupported media type"


class StorageUnavailable(LlamalithError):
    """The database cannot be used now: locked beyond the deadline, disk full, read-only, or failing."""

    status = 503
    type = "storage-unavailable"
    title = "Storage unavailable"
    retry_after_s = 5


class SessionUnreadable(StorageUnavailable):
    """A form came whose session could not be read. Carries the form's fields, so that they can be shown again."""

    def __init__(self, reason: str, fields: dict[str, str]) -> None:
        super().__init__(reason)
        self.fields = fields


class ValidatorBusy(LlamalithError):
    """All schema validators are busy, and none became free in time."""

    status = 503
    type = "schema-judge-busy"
    title = "Busy"
    retry_after_s = 5


class ReaderBusy(LlamalithError):
    """The text of a file could not be extracted, for reasons that are not the file's."""

    status = 503
    type = "reader-busy"
    title = "Busy"
    retry_after_s = 5


class RedisUnavailable(LlamalithError):
    """Redis does not answer. Raised by the queue monitor, which shows Redis, and where a worker is asked something;
    everything else works without it."""

    status = 503
    retry_after_s = 5
    type = "redis-unavailable"
    title = "Redis unavailable"
