"""Models whose files bring no chat template: the format is chosen by what is known of them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import msgspec
import pytest

from llamalith_app.engine import fallback, forms, typed
from llamalith_app.engine.fallback import BY_ARCHITECTURE, BY_TOKENS
from llamalith_app.engine.messages import ChatMessage, PromptFormat
from llamalith_app.engine.runner import LlamaRunner
from tests import tiny_models
from tests.engine.conftest import load

NAMES = sorted({*(turns.name for turns in BY_TOKENS), *BY_ARCHITECTURE.values()})
ASKED = [
    ChatMessage("system", "Be brief."),
    ChatMessage("user", "Was ist ein Drache? 🐉"),
    ChatMessage("assistant", "Ein Tier."),
    ChatMessage("user", "Wo?"),
]


@pytest.mark.parametrize("turns", BY_TOKENS, ids=lambda turns: turns.name)
def test_the_tokens_around_turns_decide(turns: fallback._Turns) -> None:
    chosen = fallback.choose(lambda text: text in turns.tokens, "llama")
    assert chosen == PromptFormat(source="vocabulary", name=turns.name)


def test_without_such_tokens_the_architecture_decides_and_else_it_is_a_guess() -> None:
    assert fallback.choose(lambda _: False, "gemma2") == PromptFormat(source="architecture", name="gemma")
    assert fallback.choose(lambda _: False, "llama") == PromptFormat(source="guess", name="chatml")


def builtin(name: str, messages: Sequence[ChatMessage]) -> str:
    """What llama.cpp itself writes."""
    chat = (llama_cpp.llama_chat_message * len(messages))()
    for at, message in enumerate(messages):
        chat[at].role, chat[at].content = message.role.encode(), message.content.encode()
    buffer = ctypes.create_string_buffer(10_000)
    n_bytes = llama_cpp.llama_chat_apply_template(name.encode(), chat, len(messages), True, buffer, len(buffer))
    assert n_bytes > 0, name
    return buffer.raw[:n_bytes].decode()


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_has_each_of_these_formats_and_shows_what_is_said(name: str) -> None:
    assert forms.missing(builtin(name, ASKED), ASKED) == []


GEMMA = ("<start_of_turn>", "<end_of_turn>")


@pytest.mark.parametrize(
    ("control", "found", "system"),
    [
        (GEMMA, PromptFormat(source="vocabulary", name="gemma"), "own"),
        (
            ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            PromptFormat(source="vocabulary", name="llama3"),
            "own",
        ),
        # It has SmolLM2's turns.
        ((), PromptFormat(source="vocabulary", name="chatml"), "own"),
    ],
)
def test_a_model_without_a_template_gets_prompts_as_llama_cpp_writes_them(
    control: Sequence[str], found: PromptFormat, system: str, tmp_path: Path
) -> None:
    path = tiny_models.write(tmp_path / "m.gguf", "llama", template="", control=control)
    runner = LlamaRunner(load(path=str(path)), lambda _: None)
    try:
        assert runner.format == msgspec.structs.replace(found, system=system)
        assert runner.render(ASKED) == builtin(found.name, ASKED)
        # What is typed is no turn.
        assert all(typed.control_in([text], runner.controls) for text in control)
    finally:
        runner.close()
