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
