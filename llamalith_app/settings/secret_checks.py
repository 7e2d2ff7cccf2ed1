"""Which secrets are required, and when one is too weak.

Owns the sentences; `strength.py` counts the guesses. No sentence contains a part of a secret.
"""

from __future__ import annotations

import re

from llamalith_app.errors import ConfigError
from llamalith_app.settings import strength
from llamalith_app.settings.config import Config
from llamalith_app.settings.messages import UNEXPANDED, is_unexpanded

SAMPLE_SECRET_KEY = "change-me-to-a-random-secret-of-32-bytes-or-more"  # noqa: S105 - refused, not used
MIN_SECRET_KEY_BYTES = 32
USUAL_TOKEN_CHARACTERS = 20
USUAL_BCRYPT_COST = 10
BCRYPT_HASH = re.compile(r"\$2[aby]\$(?:0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{53}")


def require_secrets(config: Config) -> list[str]:
    """Warnings about secrets that are weaker than usual. Raises ConfigError, one line for each secret that is missing,
    unusable or guessed within a day."""
    problems = [
        f"{name}: {reason}"
        for name, reason in (
            ("N8N_API_TOKEN", _token_problem(config.api_token)),
            ("SECRET_KEY", _secret_key_problem(config.secret_key)),
            ("ADMIN_PASSWORD_HASH", _hash_problem(config.admin_password_hash)),
        )
        if reason
    ]
    if problems:
        raise ConfigError(problems)
    warnings = []
    if len(config.api_token) < USUAL_TOKEN_CHARACTERS:
        warnings.append(
            f"N8N_API_TOKEN: has {len(config.api_token)} characters; {USUAL_TOKEN_CHARACTERS} or more are usual"
        )
    if (cost := _bcrypt_cost(config.admin_password_hash)) < USUAL_BCRYPT_COST:
        warnings.append(
            f"ADMIN_PASSWORD_HASH: has the bcrypt cost {cost}; {USUAL_BCRYPT_COST} or more is usual:"
            " `llamalith hash-password` makes a new one"
        )
    return warnings


def _token_problem(token: str) -> str:
    if not token:
        return "missing; `llamalith init` writes a .env with one"
    if re.fullmatch(r"[!-~]([ -~]*[!-~])?", token) is None:
        return "must be printable ASCII without outer spaces, as it travels in a header"
    if is_unexpanded(token, separators=""):
        return UNEXPANDED
    if strength.n_guesses(token) < strength.GUESSES_A_DAY:
        return "can be guessed within a day; `llamalith init` makes a good one"
    return ""


def _secret_key_problem(key: str) -> str:
    if not key:
        return "missing; `llamalith init` writes a .env with one"
    if key == SAMPLE_SECRET_KEY:
        return "is the sample that everybody knows; `llamalith init` makes a real one"
    if (n_bytes := len(key.encode())) < MIN_SECRET_KEY_BYTES:
        return f"has {n_bytes} bytes; at least {MIN_SECRET_KEY_BYTES} are needed"
    if is_unexpanded(key, separators=""):
        return UNEXPANDED
    if strength.n_guesses(key) < strength.FAST_GUESSES_A_DAY:
        return "can be guessed within a day; `llamalith init` makes a good one"
    return ""


def _hash_problem(text: str) -> str:
    if not text:
        return "missing; `llamalith hash-password` makes one, `llamalith init` a whole .env"
    if is_unexpanded(text, separators=""):
        return UNEXPANDED
    if BCRYPT_HASH.fullmatch(text) is None:
        return (
            "not a bcrypt hash; `llamalith hash-password` makes one"
            " (single quotes around it in .env keep a shell from reading its $)"
        )
    if (cost := _bcrypt_cost(text)) <= strength.WORST_COST:
        return (
            f"has the bcrypt cost {cost}, at which passwords can be guessed within a day;"
            " `llamalith hash-password` makes one of the usual cost"
        )
    return ""


def _bcrypt_cost(text: str) -> int:
    return int(text.split("$")[2])
