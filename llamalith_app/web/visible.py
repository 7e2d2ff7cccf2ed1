"""Replaces invisible characters, and those that change how others are displayed, by marks such as ⟨U+202E⟩.

`NAME` is for ids and names, which must not look like other ones. `EXCERPT` is for the beginning of a text and for error
reasons: it keeps white space, and the characters that join emoji and scripts. Used by the templates. Whole messages are
not changed; the pages isolate their direction.
"""

from __future__ import annotations

import re
import unicodedata
from enum import Enum
from itertools import groupby

from markupsafe import Markup

HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp", "Zs"})
SIGNS = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
"""Format characters that are visible: signs before numbers and verses."""
BLANKS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Letters and combining marks that are invisible."""
JOINERS = frozenset("\u200c\u200d")
VARIATIONS = re.compile("[\ufe00-\ufe0f\u180b-\u180d\u180f\U000e0100-\U000e01ef]")
UNSEEN_LETTER = re.compile(f"[{''.join(sorted(BLANKS))}]|{VARIATIONS.pattern}")
"""What Python calls printable, and nobody sees."""
UNASSIGNED = re.compile("[\u2065\ufff0-\ufff8\U000e0000-\U000e0fff]")
"""Unassigned code points that Unicode reserves for invisible characters."""
FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007e]{1,10}\U000e007f")
"""An emoji that spells the name of a region in invisible letters, such as the flag of Scotland."""
OUTER_SPACE = re.compile(r"^ | $|(?<= ) ")
"""Spaces that HTML collapses."""


MARK = Markup('<bdi class="mark" dir="ltr">{}</bdi>')
"""Isolated with its own direction, because it does not belong to the text."""


class Kind(Enum):
    NAME = 1
    EXCERPT = 2


def visible(text: str, kind: Kind = Kind.NAME) -> str:
    """The text with marks, not escaped."""
    return "".join(part if is_text else "".join(map(_mark, part)) for is_text, part in _parts(text, kind))


def visible_html(text: str, kind: Kind = Kind.NAME) -> Markup:
    """The text with marks as escaped HTML.

    A name is isolated in `<bdi>`, so that its direction does not affect its surroundings. An excerpt must stand in an
    element with `dir="auto"`.
    """
    inner = Markup().join(
        part if is_text else Markup().join(MARK.format(_mark(char)) for char in part)
        for is_text, part in _parts(text, kind)
    )
    return Markup("<bdi>{}</bdi>").format(inner) if kind is Kind.NAME else inner


def _mark(char: str) -> str:
    return f"⟨U+{ord(char):04X}⟩"


def _parts(text: str, kind: Kind) -> list[tuple[bool, str]]:
    """The text as runs of characters; True for a run that is shown as it is, False for one that becomes marks."""
    # Nearly all texts of a list. Character by character, they took half of its time.
    if text.isprintable() and not UNSEEN_LETTER.search(text) and (kind is Kind.EXCERPT or not OUTER_SPACE.search(text)):
        return [(True, text)] if text else []
    if kind is Kind.NAME:
        outer = {match.start() for match in OUTER_SPACE.finditer(text)}
        shown = [i not in outer and _is_seen(char) for i, char in enumerate(text)]
    else:
        flags = {i for match in FLAG.finditer(text) for i in range(*match.span())}
        shown = [i in flags or _is_kept(char) or _is_seen(char) for i, char in enumerate(text)]
    runs = groupby(zip(shown, text, strict=True), key=lambda pair: pair[0])
    return [(is_text, "".join(char for _, char in run)) for is_text, run in runs]


def _is_kept(char: str) -> bool:
    """Whether an excerpt keeps this character although it is invisible."""
    is_blank = char in "\t\n\r" or unicodedata.category(char) == "Zs"
    return is_blank or char in JOINERS or VARIATIONS.match(char) is not None


def _is_seen(char: str) -> bool:
    if char in SIGNS or char == " ":
        return True
    return (
        unicodedata.category(char) not in HIDDEN
        and char not in BLANKS
        and VARIATIONS.match(char) is None
        and UNASSIGNED.match(char) is None
    )
