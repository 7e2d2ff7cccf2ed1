"""What an engine is asked for one job's reply: the job's parameters over its model's settings, and its grammar."""

from __future__ import annotations

from collections.abc import Mapping

from llamalith_app.contracts.parameters import JsonObject, Parameters, wanted_schema
from llamalith_app.engine.client.protocol import EngineLimits, EngineRefused
from llamalith_app.engine.messages import Sampling
from llamalith_app.engine.reasoning import FAMILIES, Family
from llamalith_app.grammars import grammar as grammars_of
from llamalith_app.settings.declaration import ModelSettings
from llamalith_app.store.jobs.transitions import Claim

ANY_OBJECT = {"type": "object"}
EFFORT_TOKENS: Mapping[str | None, int] = {"none": 0, "low": 512, "medium": 2048}
DEFAULT_FAMILY = "think"
"""Of a model that thinks by its settings, where nothing says how."""


def sampling(settings: ModelSettings, parameters: Parameters | None) -> Sampling:
    """The job's own parameters, and the model's settings for those that it does not name."""
    names = Sampling.__struct_fields__
    given = {} if parameters is None else {name: getattr(parameters, name) for name in names}
    return Sampling(**{name: getattr(settings, name) if given.get(name) is None else given[name] for name in names})


def stops(settings: ModelSettings, parameters: Parameters | None) -> list[str]:
    """The stop strings: the job's own in place of the model's."""
    stop = settings.stop if parameters is None or parameters.stop is None else parameters.stop
    return [stop] if isinstance(stop, str) else list(stop)


def may_omit(parameters: Parameters | None) -> bool:
    """Whether earlier turns that do not fit the context are left out."""
    return parameters is None or parameters.truncation != "disabled"


def is_raw(parameters: Parameters | None) -> bool:
    """Whether the model reads the prompt as it is."""
    return parameters is not None and bool(parameters.raw)


def family(settings: ModelSettings, grammar: str, limits: EngineLimits, *, is_raw: bool = False) -> Family | None:
    """Between which markers the reply may begin with thinking; None: it is all reply. A grammar holds what an engine
    that knows no family writes, from its first letter on; a raw prompt may end anywhere."""
    if is_raw or settings.thinking == "off" or settings.reasoning == "none":
        return None
    default = DEFAULT_FAMILY if settings.thinking == "on" and not grammar else ""
    return FAMILIES.get(limits.family or default)


def thinking_budget(
    settings: ModelSettings, parameters: Parameters | None, grammar: str, max_tokens: int
) -> int | None:
    """How many tokens the thinking may take; None: any number. Where a grammar waits for its end and nobody names a
    number, it leaves half of the tokens for the reply."""
    effort = None if parameters is None else parameters.reasoning_effort
    if isinstance(effort, int):
        return effort
    half = max_tokens // 2 if grammar else None
    if effort in EFFORT_TOKENS:
        tokens = EFFORT_TOKENS[effort]
        return tokens if half is None else min(tokens, half)
    return half if settings.thinking_budget is None else settings.thinking_budget


def effort_arguments(parameters: Parameters | None, family: Family | None) -> dict[str, bool | int | str]:
    """What chat templates take for the job's effort; each knows some of these names."""
    effort = None if parameters is None else parameters.reasoning_effort
    if effort is None:
        return {}
    thinks = effort not in ("none", 0)
    arguments: dict[str, bool | int | str] = {"enable_thinking": thinks, "thinking": thinks}
    if isinstance(effort, int):
        arguments["thinking_budget"] = effort
    if not thinks:
        arguments["reasoning_effort"] = family.least_effort if family else "none"
    elif isinstance(effort, str):
        arguments["reasoning_effort"] = effort
    return arguments


def template_arguments(parameters: Parameters | None) -> dict[str, bool | int | float | str | None]:
    """What the job hands to the chat template itself."""
    return {} if parameters is None else parameters.chat_template_kwargs or {}


def grammar(claim: Claim, named: Mapping[str, str]) -> str:
    """The job's grammar as the engine takes it; empty: none. Raises EngineRefused for a name that this worker does not
    know."""
    wanted = None if claim.parameters is None else claim.parameters.response_format
    if (schema := wanted_schema(wanted)) is not None:
        return grammars_of.from_schema(schema.schema, claim.unenforced)
    if isinstance(wanted, JsonObject):
        return grammars_of.from_schema(ANY_OBJECT)
    if claim.grammar_name is None:
        return ""
    if claim.grammar_name not in named:
        raise EngineRefused("grammar", f"This worker has no grammar named {claim.grammar_name!r}.")
    return named[claim.grammar_name]
