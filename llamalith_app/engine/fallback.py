"""Chooses the prompt format of a model whose file brings no chat template. Pure: knows no llama.cpp.

The tokens around turns say what a model was trained on; where there are none, its architecture may. The formats are
llama.cpp's own, by their names there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from llamalith_app.engine.messages import PromptFormat

GUESS = "chatml"


class _Turns(NamedTuple):
    """The tokens that a format writes, all of them, and its name."""

    tokens: tuple[str, ...]
    name: str


BY_TOKENS = (
    _Turns(("<|channel|>", "<|message|>", "<|start|>"), "gpt-oss"),
    _Turns(("<|im_user|>", "<|im_middle|>"), "kimi-k2"),
    _Turns(("<start_of_turn>", "<end_of_turn>"), "gemma"),
    _Turns(("<|start_header_id|>", "<|eot_id|>"), "llama3"),
    _Turns(("<|header_start|>", "<|eot|>"), "llama4"),
    _Turns(("<|start_of_role|>", "<|end_of_role|>"), "granite"),
    _Turns(("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"), "command-r"),
    _Turns(("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"), "deepseek3"),
    _Turns(("[SYSTEM_PROMPT]", "[INST]", "[/INST]"), "mistral-v7"),
    _Turns(("[INST]", "[/INST]"), "mistral-v3"),
    _Turns(("[gMASK]", "<|user|>", "<|assistant|>"), "chatglm4"),
    _Turns(("<|user|>", "<|assistant|>", "<|end|>"), "phi3"),
    _Turns(("<seed:bos>", "<seed:eos>"), "seed_oss"),
    _Turns(("<end_of_utterance>",), "smolvlm"),
    # Last: vocabularies have these beside those that they were trained with.
    _Turns(("<|im_start|>", "<|im_end|>"), "chatml"),
)
"""The first one whose tokens the vocabulary has."""
BY_ARCHITECTURE: Mapping[str, str] = {
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "phi3": "phi3",
    "command-r": "command-r",
    "cohere2": "command-r",
    "deepseek2": "deepseek3",
    "chatglm": "chatglm4",
    "exaone": "exaone3",
    "granite": "granite",
    "minicpm": "minicpm",
    "orion": "orion",
    "rwkv6": "rwkv-world",
    "rwkv7": "rwkv-world",
}


def choose(is_token: Callable[[str], bool], architecture: str) -> PromptFormat:
    """`is_token`: whether the vocabulary has this text as one token. A guess says that it is one."""
    for turns in BY_TOKENS:
        if all(map(is_token, turns.tokens)):
            return PromptFormat(source="vocabulary", name=turns.name)
    if architecture in BY_ARCHITECTURE:
        return PromptFormat(source="architecture", name=BY_ARCHITECTURE[architecture])
    return PromptFormat(source="guess", name=GUESS)
