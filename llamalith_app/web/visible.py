"""Text as a page may show it beside other text: characters that nobody sees, or that change how others are read, become
marks such as ⟨U+202E⟩.

`NAME` is for what tells one thing from another (ids, names): nothing in it may look like something else that it is not.
`EXCERPT` is for the beginning of a text, and for reasons of errors: it keeps white space, and what emoji and scripts
are joined with. Whole messages are not changed at all; the pages only isolate their direction.
"""

from __future__ import annotations

import re
import unicodedata
from enum import Enum
from itertools import groupby

from markupsafe import Markup

HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp", "Zs"})
SIGNS = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
"""Format characters that are drawn: signs before numbers and verses."""
BLANKS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Letters and marks that show nothing."""
JOINERS = frozenset("\u200c\u200d")
VARIATIONS = re.compile("[\ufe00-\ufe0f\u180b-\u180d\u180f\U000e0100-\U000e01ef]")
UNASSIGNED = re.compile("[\u2065\ufff0-\ufff8\U000e0000-\U000e0fff]")
"""Code points without a meaning yet that Unicode wants to be invisible."""
FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007e]{1,10}\U000e007f")
"""An emoji that spells the name of a region in invisible letters, such as the flag of Scotland."""
OUTER_SPACE = re.compile(r"^ | $|(?<= ) ")
"""Spaces that HTML leaves out."""


MARK = Markup('<bdi class="mark" dir="ltr">{}</bdi>')
"""With a direction of its own: its letters are not the text's."""


class Kind(Enum):
    NAME = 1
    EXCERPT = 2


def visible(text: str, kind: Kind = Kind.NAME) -> str:
    """`text` with the marks in it."""
    return "".join(part if is_text else "".join(map(_mark, part)) for is_text, part in _parts(text, kind))


def visible_html(text: str, kind: Kind = Kind.NAME) -> Markup:
    """The same for HTML, escaped. A name is isolated: it turns nothing beside it. An excerpt needs an element around it
    with `dir="auto"`, which finds its direction in the text."""
    inner = Markup().join(
        part if is_text else Markup().join(MARK.format(_mark(char)) for char in part)
        for is_text, part in _parts(text, kind)
    )
    return Markup("<bdi>{}</bdi>").format(inner) if kind is Kind.NAME else inner


def _mark(char: str) -> str:
    return f"⟨U+{ord(char):04X}⟩"


def _parts(text: str, kind: Kind) -> list[tuple[bool, str]]:
    """Runs of characters, each with True where they are shown as they are."""
    if kind is Kind.NAME:
        outer = {match.start() for match in OUTER_SPACE.finditer(text)}
        shown = [i not in outer and _is_seen(char) for i, char in enumerate(text)]
    else:
        flags = {i for match in FLAG.finditer(text) for i in range(*match.span())}
        shown = [i in flags or _is_kept(char) or _is_seen(char) for i, char in enumerate(text)]
    runs = groupby(zip(shown, text, strict=True), key=lambda pair: pair[0])
    return [(is_text, "".join(char for _, char in run)) for is_text, run in runs]


def _is_kept(char: str) -> bool:
    """What an excerpt keeps beside what is seen."""
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
