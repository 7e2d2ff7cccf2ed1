"""What the engine is told of one job's reply: its parameters over its model's settings, and its grammar."""

from __future__ import annotations

from collections.abc import Mapping

from llamalith_app.contracts.parameters import JsonObject, Parameters, wanted_schema
from llamalith_app.engine.client.local import EngineRefused
from llamalith_app.engine.messages import Loaded, Sampling
from llamalith_app.grammars import grammar as grammars_of
from llamalith_app.settings.declaration import ModelSettings
from llamalith_app.store.jobs import Claim

ANY_OBJECT = {"type": "object"}


def sampling(settings: ModelSettings, said: Parameters | None) -> Sampling:
    over = {} if said is None else {name: getattr(said, name) for name in Sampling.__struct_fields__}
    return Sampling(
        **{
            name: getattr(settings, name) if over.get(name) is None else over[name]
            for name in Sampling.__struct_fields__
        }
    )


def stops(settings: ModelSettings, said: Parameters | None) -> list[str]:
    stop = settings.stop if said is None or said.stop is None else said.stop
    return [stop] if isinstance(stop, str) else list(stop)


def thinks(settings: ModelSettings, grammar: str, loaded: Loaded) -> bool:
    """Whether the reply may begin with thinking. What a grammar holds is the reply, from its first letter on."""
    if grammar:
        return False
    return loaded.can_think if settings.thinking == "auto" else settings.thinking == "on"


def grammar(claim: Claim, named: Mapping[str, str]) -> str:
    """As the engine takes it; empty: none. Raises EngineRefused for a name that this worker does not know."""
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
