"""Small charts as SVG, drawn by the server: pure functions from numbers to markup.

Each chart has a title and a description, and its numbers stand as text beside it. Colours come from the stylesheet, by
class. Knows no job and no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

WIDTH, HEIGHT, GAP = 320, 80, 2
ROW_HEIGHT, BAR_HEIGHT, LABEL_HEIGHT = 30, 10, 13
STRIP_HEIGHT, LEAST_WIDTH = 14, 2


class Bar(NamedTuple):
    """A bar of several parts, one on top of the other."""

    label: str
    parts: tuple[tuple[str, float], ...]
    """The class and the value of each part, from below."""


class Span(NamedTuple):
    """A row with two values and, where there is one, a limit."""

    label: str
    middle: float
    high: float
    limit: float | None


class Piece(NamedTuple):
    """A part of a strip."""

    kind: str
    """Its class."""
    value: float
    label: str


def bars(name: str, title: str, description: str, found: Sequence[Bar]) -> Markup:
    """Upright bars, side by side. `name`: unique on its page."""
    most = max((sum(value for _, value in bar.parts) for bar in found), default=0) or 1
    step = WIDTH / max(1, len(found))
    drawn = []
    for number, bar in enumerate(found):
        top = float(HEIGHT)
        for kind, value in bar.parts:
            height = HEIGHT * value / most
            top -= height
            if value:
                drawn.append(
                    Markup(
                        '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
                    ).format(kind, number * step, top, max(1.0, step - GAP), height, bar.label)
                )
    base = Markup('<line class="base" x1="0" y1="{0}" x2="{1}" y2="{0}"/>').format(HEIGHT, WIDTH)
    return _svg(name, title, description, HEIGHT + 1, Markup().join([*drawn, base]))


def spans(name: str, title: str, description: str, found: Sequence[Span]) -> Markup:
    """A row for each: a bar to the high value, in it one to the middle, and a mark at the limit."""
    most = max((max(span.high, span.limit or 0) for span in found), default=0) or 1
    drawn = []
    for number, span in enumerate(found):
        top = float(number * ROW_HEIGHT + LABEL_HEIGHT)
        drawn.append(Markup('<text x="0" y="{:.1f}">{}</text>').format(top - 4, span.label))
        for kind, value in (("high", span.high), ("middle", span.middle)):
            drawn.append(
                Markup('<rect class="{}" x="0" y="{:.1f}" width="{:.1f}" height="{}"/>').format(
                    f"{kind} late" if span.limit is not None and value > span.limit else kind,
                    top,
                    max(1.0, WIDTH * value / most),
                    BAR_HEIGHT,
                )
            )
        if span.limit is not None:
            x = min(WIDTH - 1.0, WIDTH * span.limit / most)
            drawn.append(
                Markup('<line class="limit" x1="{0:.1f}" y1="{1:.1f}" x2="{0:.1f}" y2="{2:.1f}"/>').format(
                    x, top - 4, top + BAR_HEIGHT + 4
                )
            )
    return _svg(name, title, description, max(1, len(found)) * ROW_HEIGHT, Markup().join(drawn))


def strip(name: str, title: str, description: str, found: Sequence[Piece]) -> Markup:
    """Parts of one bar, side by side; what would be too small to see is a little larger."""
    whole = sum(piece.value for piece in found) or 1.0
    widths = [max(float(LEAST_WIDTH), WIDTH * piece.value / whole) for piece in found]
    scale = WIDTH / max(1.0, sum(widths))
    drawn, x = [], 0.0
    for piece, width in zip(found, widths, strict=True):
        drawn.append(
            Markup('<rect class="{}" x="{:.2f}" y="0" width="{:.2f}" height="{}"><title>{}</title></rect>').format(
                piece.kind, x, width * scale, STRIP_HEIGHT, piece.label
            )
        )
        x += width * scale
    return _svg(name, title, description, STRIP_HEIGHT, Markup().join(drawn), stretched=True)


def _svg(name: str, title: str, description: str, height: float, drawn: Markup, *, stretched: bool = False) -> Markup:
    return Markup(
        '<svg class="chart" role="img" viewBox="0 0 {} {}"{} aria-labelledby="{}-title {}-desc">'
        '<title id="{}-title">{}</title><desc id="{}-desc">{}</desc>{}</svg>'
    ).format(
        WIDTH,
        height,
        Markup(' preserveAspectRatio="none"') if stretched else "",
        name,
        name,
        name,
        title,
        name,
        description,
        drawn,
    )
