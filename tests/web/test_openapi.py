"""The OpenAPI document against the real application: what it allows is taken, what it forbids is refused, and every
answer is one that it knows."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings

from llamalith_app.settings.config import Config
from tests.web.conftest import TOKEN, module_api, module_config
from tests.worker.conftest import Script, working_in_process

pytestmark = pytest.mark.asyncio(loop_scope="module")
config, api = module_config, module_api

BOUNDED = settings(
    max_examples=10,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


ASKED = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
MOST = {"maxLength": 10_000, "maxItems": 100}


def allowed(case: Any) -> None:
    """What the document cannot know: which models and grammars there are, which schemas no reply can fit, that a
    change names at least one field that is not null, that what is deleted changes in nothing else, how the turns of
    a file hang together, and what the parts of a message must have."""
    if isinstance(case.body, dict):
        for name, value in (("model", "smollm2"), ("grammar_name", "yes_or_no")):
            if (case.body.get(name) or "").strip():
                case.body[name] = value
        if "models" in case.body:
            case.body["models"] = ["other", "smollm2"]
            case.body.pop("model", None)
            case.body["content"] = case.body["content"].strip() or "x"
        case.body.pop("response_format", None)
        case.body.pop("parent", None)
        if case.operation.path.startswith("/v1/"):
            for name in ("messages", "input"):
                if isinstance(case.body.get(name), list):
                    case.body[name] = ASKED
            for name in ("previous_response_id", "text", "stream"):
                case.body.pop(name, None)
        for number, turn in enumerate(case.body.get("turns", [])):
            turn |= {"id": number, "parent": None}
            turn["messages"][-1]["role"] = "assistant"
            case.body.pop("head", None)
        if case.method.upper() == "PATCH":
            case.body.pop("deleted", None)
            case.body |= {"priority": "batch"} if "/jobs" in case.operation.path else {"pinned": True}
    if "model" in (case.query or {}):
        case.query["model"] = "other"


def with_short_limits(schema: Any) -> Any:
    """The document without limits of texts that are longer than any that Hypothesis can write, and of lists that would
    be a larger body than any request may have."""
    if isinstance(schema, list):
        return [with_short_limits(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: with_short_limits(part)
        for name, part in schema.items()
        if not (name in MOST and isinstance(part, int) and part > MOST[name])
    }


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["positive", "negative"])
async def test_the_document_describes_what_the_application_does(
    api: httpx.AsyncClient, config: Config, sent: str
) -> None:
    # Its import takes seconds, and every process of a test run reads this file.
    import schemathesis  # noqa: PLC0415
    from schemathesis.core.result import Ok  # noqa: PLC0415

    mode = schemathesis.GenerationMode(sent)
    elsewhere = [schemathesis.checks.unsupported_method, schemathesis.checks.ignored_auth]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    described = with_short_limits((await api.get("/api/openapi.json")).json())

    def ask_all() -> int:
        document = schemathesis.openapi.from_dict(described)
        n_asked = 0
        for found in document.get_all_operations():
            assert isinstance(found, Ok), found
            operation = found.ok()
            # A stream of an open job has no end, and without a worker nothing is ready.
            if operation.path.endswith(("/events", "/readyz")):
                continue
            # What takes nothing cannot be sent anything wrong.
            if mode is schemathesis.GenerationMode.NEGATIVE and operation.path in (
                "/api/models",
                "/v1/models",
                "/healthz",
            ):
                continue

            @BOUNDED
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                if mode is schemathesis.GenerationMode.POSITIVE:
                    allowed(case)
                else:
                    # A number that may be absent may be null as well, which the document cannot say of a query.
                    assume(all(value not in (None, "null") for value in (case.query or {}).values()))
                case.call_and_validate(base_url=str(api.base_url), headers=headers, excluded_checks=elsewhere)

            ask()
            n_asked += 1
        return n_asked

    # A call waits for its reply.
    async with working_in_process(config, Script(config.data_dir / "script.json")):
        assert await asyncio.to_thread(ask_all) == (46 if mode is schemathesis.GenerationMode.POSITIVE else 43)
