"""Who owns what. Until people and keys exist everything belongs to the admin, the first user."""

from __future__ import annotations

ADMIN_ID = 1
"""Made by the first migration."""
