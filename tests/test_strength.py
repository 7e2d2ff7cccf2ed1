"""What counts as a secret that can be guessed within a day."""

from __future__ import annotations

import base64
import random
import secrets
import string

import pytest

from llamalith_app.settings.strength import FAST_GUESSES_A_DAY, GUESSES_A_DAY, n_guesses


@pytest.mark.parametrize(
    "secret",
    [
        *("x", "tok", "123456", "password", "Password123", "changeme!", "admin-token", "llamalith", "n8n", "qwerty12"),
        *(
            "a" * 100_000,
            "ab" * 50,
            "abcdefghijklmnopqrstuvwxyz",
            "98765432109876543210",
            "test-test-test-test",
            "пароль",
        ),
    ],
)
def test_what_is_short_common_or_repeated_can_be_guessed(secret: str) -> None:
    assert n_guesses(secret) < GUESSES_A_DAY


def test_what_was_drawn_at_random_cannot() -> None:
    """The same draws in every run: of 20 digits, one draw in 100,000 has so many repetitions and runs that it counts
    as one that can be guessed."""
    dist = random.Random(1)

    def urlsafe(n_bytes: int) -> str:
        return base64.urlsafe_b64encode(dist.randbytes(n_bytes)).decode()

    for _ in range(1000):
        for secret in (urlsafe(12), dist.randbytes(16).hex(), "".join(dist.choices(string.digits, k=20))):
            assert n_guesses(secret) > GUESSES_A_DAY, secret
        for key in (urlsafe(48), dist.randbytes(32).hex()):
            assert n_guesses(key) > FAST_GUESSES_A_DAY, key


def test_several_rare_words_cannot() -> None:
    assert n_guesses("correct horse battery staple") > FAST_GUESSES_A_DAY


def test_a_secret_of_any_length_is_counted_at_once() -> None:
    assert n_guesses(secrets.token_hex(10**6)) > FAST_GUESSES_A_DAY
