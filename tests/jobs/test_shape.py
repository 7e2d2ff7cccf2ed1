"""A job's parameters over its model's settings, as the engine gets them."""

from __future__ import annotations

import msgspec
import pytest

from llamalith_app.contracts.parameters import (
    AnyText,
    EffortWord,
    JsonObject,
    JsonSchema,
    NamedSchema,
    Parameters,
    ResponseFormat,
)
from llamalith_app.engine.client.protocol import EngineLimits
from llamalith_app.engine.messages import Sampling
from llamalith_app.engine.reasoning import FAMILIES
from llamalith_app.grammars import grammar
from llamalith_app.jobs.worker import shape
from llamalith_app.settings.declaration import ModelSettings
from llamalith_app.store.jobs.transitions import Claim

SETTINGS = ModelSettings(temperature=0.9, top_k=7, seed=3, stop=("a",))


def claim(grammar_name: str | None, response_format: ResponseFormat | None = None) -> Claim:
    parameters = None if response_format is None else Parameters(response_format=response_format)
    return Claim(1, 1, "lease", 1, 0, "m", grammar_name, "r", parameters, None)


def test_the_parameters_of_a_job_override_its_models_settings_and_those_the_defaults() -> None:
    parameters = shape.sampling(SETTINGS, Parameters(temperature=0.0, max_tokens=5, seed=0))
    assert (parameters.temperature, parameters.max_tokens, parameters.seed) == (0.0, 5, 0)
    assert (parameters.top_k, parameters.top_p) == (7, ModelSettings().top_p)
    assert shape.sampling(SETTINGS, None) == shape.sampling(SETTINGS, Parameters())


def test_every_setting_of_the_sampling_can_be_overridden_by_a_job() -> None:
    parameters = msgspec.convert(dict.fromkeys(Sampling.__struct_fields__, 1), Parameters)
    drawn = shape.sampling(SETTINGS, parameters)
    assert [getattr(drawn, name) for name in Sampling.__struct_fields__] == [1] * len(Sampling.__struct_fields__)


@pytest.mark.parametrize(
    ("parameters", "stops"),
    [
        (None, ["a"]),
        (Parameters(), ["a"]),
        (Parameters(stop="b"), ["b"]),
        (Parameters(stop=("b", "c")), ["b", "c"]),
        (Parameters(stop=()), []),
    ],
)
def test_the_jobs_stop_strings_are_in_place_of_the_models(parameters: Parameters | None, stops: list[str]) -> None:
    assert shape.stops(SETTINGS, parameters) == stops


def test_a_reply_is_held_to_what_its_job_names() -> None:
    named = {"g": "text of g"}
    schema = {"type": "integer"}
    assert shape.grammar(claim(None), named) == ""
    assert shape.grammar(claim("g"), named) == "text of g"
    assert shape.grammar(claim("g", AnyText()), named) == "text of g"
    assert shape.grammar(claim(None, JsonObject()), named) == grammar.from_schema({"type": "object"})
    for form in (
        JsonSchema(json_schema=NamedSchema(name="n", schema=schema)),
        JsonSchema(schema=schema),
        JsonObject(schema=schema),
    ):
        assert shape.grammar(claim(None, form), named) == grammar.from_schema(schema)
    assert shape.grammar(claim(None, JsonObject(schema={})), named) == grammar.from_schema({"type": "object"})


def test_a_reply_is_not_held_to_what_cannot_be_enforced() -> None:
    sets = JsonSchema(schema={"type": "array", "uniqueItems": True})
    asked = claim(None, sets)._replace(unenforced=("#/uniqueItems",))
    assert shape.grammar(asked, {}) == grammar.from_schema({"type": "array"})


@pytest.mark.parametrize(
    ("settings", "found", "grammar", "thinks_as"),
    [
        ({}, "seed", "", "seed"),
        ({}, "", "", None),
        ({"thinking": "on"}, "", "", "think"),
        ({"thinking": "on"}, "seed", "", "seed"),
        ({"thinking": "off"}, "seed", "", None),
        ({"reasoning": "none"}, "seed", "", None),
        ({"reasoning": "none", "thinking": "on"}, "", "", None),
        ({}, "seed", "a grammar", "seed"),
        ({"thinking": "on"}, "", "a grammar", None),
        ({"thinking": "off"}, "seed", "a grammar", None),
    ],
)
def test_a_reply_may_begin_with_thinking_where_the_model_or_its_setting_says_so(
    settings: dict[str, str], found: str, grammar: str, thinks_as: str | None
) -> None:
    limits = EngineLimits(n_ctx=1, n_slots=1, family=found)
    wanted = FAMILIES[thinks_as] if thinks_as else None
    assert shape.family(msgspec.convert(settings, ModelSettings), grammar, limits) is wanted


@pytest.mark.parametrize(
    ("setting", "grammar", "budget"),
    [(None, "", None), (None, "a grammar", 50), (0, "", 0), (7, "", 7), (70, "a grammar", 70)],
)
def test_thinking_takes_what_its_setting_allows_and_leaves_half_to_a_grammar(
    setting: int | None, grammar: str, budget: int | None
) -> None:
    assert shape.thinking_budget(ModelSettings(thinking_budget=setting), None, grammar, 100) == budget


@pytest.mark.parametrize(
    ("effort", "grammar", "budget"),
    [
        ("none", "", 0),
        ("low", "", 512),
        ("medium", "", 2048),
        ("high", "", 7),
        (0, "", 0),
        (900, "a grammar", 900),
        ("none", "a grammar", 0),
        ("medium", "a grammar", 500),
        (None, "a grammar", 7),
    ],
)
def test_a_jobs_effort_stands_over_its_models_budget(
    effort: EffortWord | int | None, grammar: str, budget: int | None
) -> None:
    settings = ModelSettings(thinking_budget=7)
    assert shape.thinking_budget(settings, Parameters(reasoning_effort=effort), grammar, 1000) == budget


def test_a_template_is_told_the_effort_in_the_words_that_it_may_know() -> None:
    def told(effort: EffortWord | int | None, family: str = "think") -> dict[str, bool | int | str]:
        return shape.effort_arguments(Parameters(reasoning_effort=effort), FAMILIES[family])

    assert told(None) == shape.effort_arguments(None, None) == {}
    assert told("none") == {"enable_thinking": False, "thinking": False, "reasoning_effort": "none"}
    assert told("none", "harmony")["reasoning_effort"] == "low", "it knows no less"
    assert told("high") == {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}
    assert told(5) == {"enable_thinking": True, "thinking": True, "thinking_budget": 5}
    assert told(0) == {**told("none"), "thinking_budget": 0}
