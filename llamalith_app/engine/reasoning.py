"""The families of reasoning models: between which markers each writes its thinking, and how a model's family is found.

Owns the markers and nothing else: `reply.py` takes a reply apart by them. Pure: knows no llama.cpp. The
names are those of the setting `reasoning`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple


class Family(NamedTuple):
    """The markers of one family. Blanks around a marker belong to it. An empty one: the family has none."""

    opens: str
    """Begins the thinking, or a header: see `header_closes`."""
    closes: str
    """Ends the thinking."""
    reply_opens: str = ""
    """May stand in front of the reply."""
    reply_closes: str = ""
    """May stand at the end of the reply."""
    header_closes: str = ""
    """The family writes several messages in a row, each with a header, which ends here. `opens` and `next_opens` begin
    one."""
    next_opens: str = ""
    """Begins the header of another message."""
    thinks_in: str = ""
    """What the header of thinking says behind `opens`. A message with any other header is part of the reply."""
    final: str = ""
    """Begins the reply behind `closes`, where the model would go on thinking otherwise."""
    least_effort: str = "none"
    """What a chat template takes for the least thinking, as its argument `reasoning_effort`."""
    signs: tuple[str, ...] = ()
    """A chat template with all of these is one of this family's, and so is a vocabulary. Empty: one of `opens` and
    `closes` is enough."""

    @property
    def markers(self) -> frozenset[str]:
        """Those that may be tokens of their own."""
        written = (self.opens, self.closes, self.reply_opens, self.reply_closes, self.header_closes, self.next_opens)
        return frozenset(marker for marker in written if marker.strip())

    @property
    def opening(self) -> str:
        """The end of a prompt behind which the model thinks."""
        return f"{self.opens}{self.thinks_in}{self.header_closes}".rstrip()

    @property
    def closing(self) -> str:
        """What ends the thinking by force."""
        return self.closes + self.final

    @property
    def kept_in_history(self) -> tuple[str, ...]:
        """What templates look for in earlier replies, to leave their thinking out."""
        return () if self.header_closes else (self.opens, self.closes)


FAMILIES: Mapping[str, Family] = {
    "harmony": Family(
        "<|channel|>",
        "<|end|>",
        reply_closes="<|end|>",
        header_closes="<|message|>",
        next_opens="<|start|>",
        thinks_in="analysis",
        least_effort="low",
        final="<|start|>assistant<|channel|>final<|message|>",
        signs=("<|channel|>", "<|message|>"),
    ),
    "gemma4": Family("<|channel>", "<channel|>", header_closes="\n", thinks_in="thought"),
    "command-r7b": Family(
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        "<|START_RESPONSE|>",
        "<|END_RESPONSE|>",
        signs=("<|START_THINKING|>", "<|START_RESPONSE|>"),
    ),
    "cohere": Family("<|START_THINKING|>", "<|END_THINKING|>", "<|START_TEXT|>", "<|END_TEXT|>"),
    "magistral": Family("[THINK]", "[/THINK]"),
    "seed": Family("<seed:think>", "</seed:think>"),
    "minimax-m3": Family("<mm:think>", "</mm:think>"),
    "granite": Family(
        "<think>", "</think>", "<response>", "</response>", signs=("<think></think>", "<response></response>")
    ),
    "apriel": Family("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]", reply_closes="[END FINAL RESPONSE]"),
    "exaone": Family("<thought>", "</thought>"),
    "think": Family("<think>", "</think>"),
    "thinking": Family("<thinking>", "</thinking>"),
}
"""In the order in which they are looked for: what says more comes first."""
MARKERS = frozenset[str]().union(*(family.markers for family in FAMILIES.values()))


def find(template: str, specials: Collection[str]) -> str:
    """The name of a model's family; empty: it cannot think, as far as is known. The chat template says more than the
    special tokens: vocabularies are shared by models that think and others."""
    for known in (template, frozenset(specials)):
        for name, family in FAMILIES.items():
            signs = [sign in known for sign in family.signs or (family.opens, family.closes)]
            if all(signs) if family.signs else any(signs):
                return name
    return ""
