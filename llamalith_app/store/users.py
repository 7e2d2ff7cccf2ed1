"""The owner of everything: the admin, the only user there is so far."""

from __future__ import annotations

ADMIN_ID = 1
"""The first migration inserts this row."""
