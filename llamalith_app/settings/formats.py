"""The formats of settings that are text: types whose pattern checks a value and whose title describes it.

Knows no setting, and nothing of numbers (`ranges.py`).
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from msgspec import Meta

# `$` alone would let one line break follow; this end means the same to Python and to JSON Schema.
END = r"(?![\s\S])"
PORT = r":(?:6553[0-5]|655[0-2]\d|65[0-4]\d\d|6[0-4]\d{3}|[1-5]\d{4}|[1-9]\d{0,3})"
HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[^\s/?#@:\[\]]+)"
MAX_NAME_CHARACTERS = 100
MAX_PATH_CHARACTERS = 4096

ChatFormat = Literal[
    "auto",
    "chat_template",
    "llama-2",
    "llama-3",
    "alpaca",
    "qwen",
    "vicuna",
    "oasst_llama",
    "baichuan-2",
    "baichuan",
    "openbuddy",
    "redpajama-incite",
    "snoozy",
    "phind",
    "intel",
    "open-orca",
    "mistrallite",
    "zephyr",
    "pygmalion",
    "chatml",
    "mistral-instruct",
    "chatglm3",
    "openchat",
    "saiga",
    "gemma",
]
TEMPLATE_FORMATS = ("auto", "chat_template")
"""Both mean the GGUF's own template; the second is the original's word for it."""
CHAT_FORMATS: tuple[str, ...] = get_args(ChatFormat)[len(TEMPLATE_FORMATS) :]
"""llama-cpp-python's formats that only write a prompt; those that call functions are of no use here."""

Reasoning = Literal[
    "auto",
    "none",
    "think",
    "thinking",
    "magistral",
    "seed",
    "granite",
    "exaone",
    "apriel",
    "minimax-m3",
    "command-r7b",
    "cohere",
    "gemma4",
    "harmony",
]
"""The families of reasoning models, behind two words of their own."""

ModelName = Annotated[
    str,
    Meta(
        title=f"a name of 1 to {MAX_NAME_CHARACTERS} characters without comma, control characters and outer spaces",
        pattern=rf"^(?!\s)[^,\x00-\x1f\x7f-\x9f]{{1,{MAX_NAME_CHARACTERS}}}(?<!\s){END}",
    ),
]
PATH = Meta(
    title=f"a path of 1 to {MAX_PATH_CHARACTERS} characters",
    pattern=rf"^[^\x00-\x1f\x7f]{{1,{MAX_PATH_CHARACTERS}}}{END}",
)
PathText = Annotated[str, PATH]
Sha256 = Annotated[str, Meta(title="64 hexadecimal digits", pattern=rf"^[0-9A-Fa-f]{{64}}{END}")]
RedisUrl = Annotated[
    str,
    Meta(
        title="redis://HOST[:PORT][/DB], rediss://… or unix:///PATH (for a Valkey too)",
        pattern=(
            rf"^(?:rediss?://(?:[^\s/?#@]*@)?{HOST}(?:{PORT})?(?:/\d*)?(?:\?\S*)?"
            rf"|unix://(?:[^\s/?#@]*@)?/\S+){END}"
        ),
    ),
]
DatabaseUrl = Annotated[
    str,
    Meta(
        title="sqlite:///PATH, a file (this version speaks SQLite only)",
        pattern=rf"^sqlite:///(?!:memory:|file:)[^?#\x00-\x1f\x7f]*[^?#\x00-\x1f\x7f/]{END}",
    ),
]
Origin = Annotated[
    str,
    Meta(
        title="an exact origin SCHEME://HOST[:PORT] (never *: answers may carry credentials)",
        pattern=rf"^https?://(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?:{PORT})?{END}",
    ),
]
Network = Annotated[
    str,
    Meta(
        title="an address or a network, such as 127.0.0.1 or 10.0.0.0/8",
        pattern=rf"^[0-9A-Fa-f:.]{{2,45}}(?:/\d{{1,3}})?{END}",
    ),
]
AllowedHost = Annotated[
    str,
    Meta(
        title="a name or an address, with or without a port, such as chat.example.org or [::1]:8000",
        pattern=rf"^(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?:{PORT})?{END}",
    ),
]
Hsts = Annotated[
    str,
    Meta(
        title="seconds such as 31536000, alone or with '; includeSubDomains' and '; preload' behind them",
        pattern=rf"^\d{{1,10}}(?:; ?includeSubDomains(?:; ?preload)?)?{END}",
    ),
]
