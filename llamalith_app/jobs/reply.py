"""From what a model wrote to the reply that is kept: thinking cut out, blanks around it stripped."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


def clean(text: str) -> str:
    """Removes each `<think>…</think>`, one that never closes to its end, a head that only closes one, and NULs.

    Linear in the text's length.
    """
    kept, at = [], 0
    first_close, first_open = text.find(CLOSE), text.find(OPEN)
    if first_close >= 0 and (first_open < 0 or first_close < first_open):
        # A template that itself opens the block leaves only its end in the reply.
        at = first_close + len(CLOSE)
    while (start := text.find(OPEN, at)) >= 0:
        kept.append(text[at:start])
        end = text.find(CLOSE, start)
        if end < 0:
            at = len(text)
            break
        at = end + len(CLOSE)
    kept.append(text[at:])
    return "".join(kept).replace("\0", "").strip()
