"""How many guesses a secret withstands, roughly and without dictionaries: enough to refuse what falls within a day.

Knows neither where secrets are set nor how a message describes a weak one.
"""

from __future__ import annotations

import itertools
import re
import string

# What "a day" is, in guesses. One that must be sent to the web, or tried against a bcrypt hash of the usual cost 12
# (about 1,400 a second on a graphics card, with several of them): 10,000 a second for 86,400 seconds.
GUESSES_A_DAY = 10**9
# One that is tried against a SHA-256 digest on graphics cards: 10 billion a second.
FAST_GUESSES_A_DAY = 10**15

# Half of all passwords of eight random lower-case letters (2e11) can be tried in a day against a hash of this cost:
# eight graphics cards make 184,000 guesses a second each at cost 5. At 6 it takes longer.
WORST_COST = 5

COMMON = (
    *("password", "passwort", "passwd", "secret", "token", "admin", "administrator", "root", "user", "test", "testing"),
    *("change", "changeme", "default", "example", "sample", "letmein", "welcome", "login", "guest", "demo", "dummy"),
    *("qwerty", "qwertz", "asdf", "iloveyou", "monkey", "dragon", "master", "hello", "llama", "llamalith", "n8n"),
    *("api", "key", "bearer", "your", "here", "todo", "none", "null", "undefined"),
)
"""Each counts as one character: it is the first that is tried."""
_COMMON = re.compile("|".join(sorted(COMMON, key=len, reverse=True)), re.IGNORECASE)
_REPEATED = re.compile(r"(.+?)\1+", re.DOTALL)
MOST_CHARACTERS = 200
"""What comes behind them adds nothing."""
ALPHABETS = (string.ascii_lowercase, string.ascii_uppercase, string.digits, string.punctuation + " ")


def n_guesses(secret: str) -> int:
    """How many tries are needed to go through all secrets of this kind: the alphabet it draws from, to the power of
    its characters. A repetition counts once, a run such as `abcd` or `4321` as its first two."""
    secret = secret[:MOST_CHARACTERS]
    shortened = _REPEATED.sub(r"\1", _COMMON.sub("\0", secret))
    steps = [ord(after) - ord(before) for before, after in itertools.pairwise(shortened)]
    n_in_runs = sum(one == next_ and abs(one) == 1 for one, next_ in itertools.pairwise(steps))
    n_characters = len(shortened) - n_in_runs
    n_alphabet = sum(len(alphabet) for alphabet in ALPHABETS if not set(secret).isdisjoint(alphabet))
    # Of other scripts only the characters that are there are counted: nothing is known of how they were drawn.
    n_alphabet += len(set(secret).difference(*ALPHABETS))
    guesses: int = n_alphabet**n_characters
    return guesses
