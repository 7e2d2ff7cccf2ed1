"""The web's configuration, for the tests of its older routes."""

from __future__ import annotations

from tests.web.conftest import config

__all__ = ["config"]
