"""How fast each model was lately in this worker, as moving averages over attempts that ended well; and how many prompt
tokens all of them had. Knows no engine."""

from __future__ import annotations

from collections import defaultdict
from typing import Literal, NamedTuple

WEIGHT = 0.2
"""Of the newest value in an average."""

Measure = Literal["tokens_per_s", "prompt_tokens_per_s", "load_s", "job_s", "completion_tokens"]


class PromptTokens(NamedTuple):
    computed: int = 0
    reused: int = 0


class Speeds:
    def __init__(self) -> None:
        self._found: defaultdict[str, dict[Measure, float]] = defaultdict(dict)
        self._prompt_tokens: dict[str, PromptTokens] = {}

    def learn(self, model: str, measure: Measure, value: float) -> None:
        before = self._found[model].get(measure, value)
        self._found[model][measure] = before + WEIGHT * (value - before)

    def count(self, model: str, *, computed: int, reused: int) -> None:
        before = self.prompt_tokens(model)
        self._prompt_tokens[model] = PromptTokens(before.computed + computed, before.reused + reused)

    def prompt_tokens(self, model: str) -> PromptTokens:
        return self._prompt_tokens.get(model, PromptTokens())

    def averages(self, model: str) -> dict[Measure, float]:
        """The measures known so far; seconds, tokens, or tokens a second."""
        return {measure: round(value, 3) for measure, value in self._found[model].items()}
