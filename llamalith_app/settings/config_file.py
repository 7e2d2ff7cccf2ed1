"""What may stand in `config.json`, and the judging of one: every problem, each by its place.

The types below are the whole rule: limits, the words in which they are told, and the JSON Schema come from
them. Knows nothing of the environment, of defaults outside the file and of what the settings are used for.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import msgspec
from msgspec import UNSET, Meta

from llamalith_app import files
from llamalith_app.settings import ranges
from llamalith_app.settings.ranges import in_words, takes_lone_text, title, without_none

# `$` alone would let one line break follow; this end means the same to Python and to JSON Schema.
END = r"(?![\s\S])"
PORT = r":(?:6553[0-5]|655[0-2]\d|65[0-4]\d\d|6[0-4]\d{3}|[1-5]\d{4}|[1-9]\d{0,3})"
HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[^\s/?#@:\[\]]+)"
MAX_SECONDS = 31_536_000
"""A year."""
SHOWN_CHARACTERS = 80
MAX_BYTES = 1024**2
"""Of a `config.json`; a hundred models take 50 kB."""
NUMBER = re.compile(r"\s*[+-]?\d{1,18}(?:\.\d{1,18})?\s*", re.ASCII)

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
"""Both: the GGUF's own template; the second is the original's other word for it."""
CHAT_FORMATS: tuple[str, ...] = get_args(ChatFormat)[len(TEMPLATE_FORMATS) :]
"""llama-cpp-python's formats that only write a prompt; those that call functions are no use here."""

ModelName = Annotated[
    str,
    Meta(
        title="a name of 1 to 100 characters without comma, control characters and outer spaces",
        pattern=rf"^(?!\s)[^,\x00-\x1f\x7f-\x9f]{{1,100}}(?<!\s){END}",
    ),
]
PathText = Annotated[str, Meta(title="a path of 1 to 4096 characters", pattern=rf"^[^\x00-\x1f\x7f]{{1,4096}}{END}")]
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
Seconds = Annotated[float, Meta(gt=0, le=604_800)]


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one model is loaded and how its replies are drawn, unless a job says otherwise."""

    n_ctx: Annotated[
        int,
        Meta(ge=256, le=1_048_576, description="Tokens of prompt and reply together that one turn may hold."),
    ] = 4096
    n_chunk: Annotated[
        int,
        Meta(ge=1, le=4096, description="Prompt tokens that one step reads at most; measured speed sets how many."),
    ] = 512
    n_threads: Annotated[int, Meta(ge=0, le=512, description="CPU threads; 0: as many as there are cores.")] = 0
    n_gpu_layers: Annotated[int, Meta(ge=-1, le=1_000_000, description="Layers held by the GPU; -1: all.")] = 0
    n_slots: (
        Annotated[
            int,
            Meta(ge=1, le=64, description="Jobs that this model runs side by side; unset: worker_count, or by itself."),
        ]
        | None
    ) = None
    pinned: Annotated[bool, Meta(description="Once loaded it is never unloaded.")] = False
    preload: Annotated[bool, Meta(description="Loaded before a job asks for it, whenever there is room.")] = False
    thinking: Annotated[
        Literal["auto", "on", "off"],
        Meta(
            description="Whether a <think> at the beginning of a reply is kept apart from it; auto: where the model's"
            " chat template or vocabulary knows the tag."
        ),
    ] = "auto"
    max_tokens: ranges.MaxTokens = 1024
    temperature: ranges.Temperature = 0.7
    top_p: ranges.ShareAboveZero = 0.95
    top_k: ranges.TopK = 40
    min_p: ranges.Share = 0.05
    typical_p: ranges.ShareAboveZero = 1.0
    repeat_penalty: ranges.RepeatPenalty = 1.0
    presence_penalty: ranges.Penalty = 0.0
    frequency_penalty: ranges.Penalty = 0.0
    seed: ranges.Seed | None = None
    stop: ranges.Stops = ()


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    worker_count: (
        Annotated[
            int,
            Meta(
                ge=1,
                le=64,
                description="Jobs that a loaded model runs side by side; unset: by the machine's cores and memory.",
            ),
        ]
        | None
    ) = None


Wait = Annotated[float, Meta(ge=0, le=MAX_SECONDS)]


class MaxWait(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds that a job of each class waits at most for another model's jobs, or those of a class before its own."""

    interactive: Wait = 30.0
    normal: Wait = 120.0
    batch: Wait = 900.0


class ConfigFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Llamalith's configuration. Relative paths start at this file's folder; null is the same as not set."""

    schema: str | None = msgspec.field(name="$schema", default=None)
    available_models: (
        Annotated[
            tuple[ModelName, ...],
            Meta(description="Names offered, in order; the first is the default. Unset: those of model_paths."),
        ]
        | None
    ) = None
    model_paths: Annotated[dict[ModelName, PathText], Meta(description="The GGUF file of each.")] | None = None
    model_formats: (
        Annotated[
            dict[ModelName, ChatFormat],
            Meta(description="auto: the GGUF's own chat template; else a format of llama-cpp-python."),
        ]
        | None
    ) = None
    model_sha256: (
        Annotated[dict[ModelName, Sha256], Meta(description="Checked before the file is loaded. Unset: unchecked.")]
        | None
    ) = None
    model_settings: dict[ModelName, ModelSettings] | None = None
    worker_settings: WorkerSettings | None = None
    data_dir: Annotated[PathText, Meta(description="Where all state lives; ./data.")] | None = None
    database_url: Annotated[DatabaseUrl, Meta(description="Unset: llamalith.db in the data directory.")] | None = None
    redis_url: Annotated[RedisUrl, Meta(description="Unset: a Valkey of its own.")] | None = None
    cors_origins: Annotated[tuple[Origin, ...], Meta(description="Origins of browsers that may call.")] | None = None
    trusted_proxies: (
        Annotated[
            tuple[Network, ...],
            Meta(description="Proxies whose X-Forwarded-For and -Proto count; unset: none."),
        ]
        | None
    ) = None
    allowed_hosts: (
        Annotated[
            tuple[AllowedHost, ...],
            Meta(description="Hosts under which requests are answered; unset: all."),
        ]
        | None
    ) = None
    hsts: Annotated[Hsts, Meta(description="Seconds of Strict-Transport-Security over https; unset: none.")] | None = (
        None
    )
    max_attempts: (
        Annotated[
            int,
            Meta(ge=1, le=100, description="Times that a job is tried when its engine or worker dies; 3."),
        ]
        | None
    ) = None
    timeout_s: (
        Annotated[
            Seconds, Meta(description="Seconds that a job may run, loading included; unset: as long as it takes.")
        ]
        | None
    ) = None
    queue_timeout_s: (
        Annotated[
            Seconds,
            Meta(description="Seconds that a job may wait for its first start; unset: as long as it takes."),
        ]
        | None
    ) = None
    retention_days: (
        Annotated[
            float,
            Meta(gt=0, le=36_500, description="Days that a job and its turn are kept after its end; unset: for ever."),
        ]
        | None
    ) = None
    memory_budget_mb: (
        Annotated[
            int,
            Meta(ge=1, le=2**30, description="MiB that loaded models may take together; unset: 80 % of the machine's."),
        ]
        | None
    ) = None
    idle_unload_s: (
        Annotated[float, Meta(ge=0, le=MAX_SECONDS, description="Without work for so long, a model goes; 0: never.")]
        | None
    ) = None
    state_cache_mb: (
        Annotated[int, Meta(ge=0, le=2**30, description="MiB on disk for computed prompts, 2048; 0: none are kept.")]
        | None
    ) = None
    max_wait_s: MaxWait | None = None
    max_queued: (
        Annotated[int, Meta(ge=1, le=10**9, description="Jobs of one owner that may wait at once; 100000.")] | None
    ) = None
    grammar_dir: Annotated[PathText, Meta(description="Folder with *.gbnf; unset: the one shipped.")] | None = None
    log_format: Literal["auto", "json", "text"] | None = None
    log_level: Literal["debug", "info", "warning", "error"] | None = None


# What the original read and nothing here needs. Its own sampling of end tokens is the model's business now.
MEANINGLESS_KEY = re.compile(
    r"(?:^|[_-])(?:bias|end_?tokens?|eos_?tokens?|stop_?tokens?)(?:[_-]|$)"
    r"|^(?:story_settings|max_continues|poll_\w+|n_batch)$"
)
SECRETS = {
    "secret_key": "SECRET_KEY",
    "admin_password_hash": "ADMIN_PASSWORD_HASH",
    "n8n_api_token": "N8N_API_TOKEN",
    "api_token": "N8N_API_TOKEN",
}
PATH_KEYS = ("data_dir", "grammar_dir")
TYPES: Mapping[str, Any] = {field.encode_name: field.type for field in msgspec.structs.fields(ConfigFile)}


class Judged(NamedTuple):
    values: dict[str, Any]
    """What was given and is good, by ConfigFile's keys and of the types there, paths absolute; structs as dicts."""
    origins: dict[str, str]
    """How a message names a path that was set: where, as what, and from which folder. By key, models as
    `model_paths.NAME`."""
    problems: list[str]
    knows_models: bool
    """False where model_paths could not be understood: who asks for a model then need not be told so."""
    ignored: list[str]
    """Places of what the original knew and means nothing here."""


def read(path: Path, label: str, origin: str | None = None) -> Judged:
    """Reads and judges a file; `label` is how problems name it, `origin` how they do where it cannot be read. Never
    raises for what stands in it."""
    problems: list[str] = []
    tree = _parsed(path, label, origin or label, problems)
    ignored: list[str] = []
    values = UNSET if tree is UNSET else ConfigValidator(f"{label}: ", problems, ignored).value(tree, ConfigFile, "")
    if values is UNSET:
        return Judged({}, {}, problems, knows_models=False, ignored=[])
    knows_models = not any(problem.startswith(f"{label}: model_paths") for problem in problems)
    absolute, origins = located(values, path.parent, f"{label}: ", problems)
    return Judged(absolute, origins, problems, knows_models, ignored)


def judge_text(key: str, text: str, name: str) -> tuple[Any, list[str]]:
    """What a variable of that name says in text for a key of ConfigFile, or UNSET; and the problems."""
    found: Any = text
    wanted = without_none(TYPES[key])
    bare = get_args(wanted)[0] if get_origin(wanted) is Annotated else wanted
    if get_origin(bare) is tuple:
        found = split(text)
    elif bare is int and re.fullmatch(r"\s*[+-]?\d{1,18}\s*", text, re.ASCII):
        found = int(text)
    elif bare is float and NUMBER.fullmatch(text):
        found = float(text)
    problems: list[str] = []
    value = ConfigValidator("", problems, []).value(found, wanted, name)
    return value, problems


def located(
    values: Mapping[str, Any], folder: Path, prefix: str, problems: list[str], names: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The same with absolute paths (as `Path`), relative ones starting at `folder`; and their origins.

    `prefix` and `names` (by key; default: the key itself) are how the place of a value is told. Values that cannot be
    used are left out, and their problems added.
    """
    found: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def locate(key: str, text: str, at: str) -> Path | None:
        try:
            path = resolved(text, folder)
        except ValueError as error:
            problems.append(f"{at}: {shown(text)} {error}")
            return None
        origins[key] = origin(at, text, folder)
        return path

    for key, value in values.items():
        at = f"{prefix}{(names or {}).get(key, key)}"
        if key in PATH_KEYS:
            found[key] = locate(key, value, at)
        elif key == "database_url":
            found["database_path"] = locate("database_path", value.removeprefix("sqlite:///"), at)
        elif key == "model_paths":
            paths = {name: locate(f"{key}.{name}", text, f"{at}.{plain(name)}") for name, text in value.items()}
            found[key] = {name: path for name, path in paths.items() if path is not None}
        elif key == "redis_url" and is_unexpanded(value):
            problems.append(f"{at}: {shown(value)} {UNEXPANDED}")
        else:
            found[key] = value
    return {key: value for key, value in found.items() if value is not None}, origins


def resolved(text: str, folder: Path) -> Path:
    """The absolute path that a setting means: `~` is a home directory, a relative path starts at `folder`.

    Raises ValueError, with the rest of a sentence, for a variable that nothing replaced and for an unknown home.
    """
    if is_unexpanded(text):
        raise ValueError(UNEXPANDED)
    # Not Path's own: to that `./~/x`, which names a folder of this name, is the same as `~/x`.
    expanded = os.path.expanduser(text)  # noqa: PTH111
    if expanded.startswith("~"):
        raise ValueError("starts with a ~ whose home directory is not known; ./~ is a folder of this name")
    return folder / expanded


def origin(at: str, text: str, folder: Path) -> str:
    """How a message begins that is about a path: where it was set, as what, and from which folder it was resolved."""
    is_relative = not text.startswith(("/", "~"))
    return f"{at}: {shown(text)}{f' (relative to {folder})' if is_relative else ''}"


UNEXPANDED = (
    "looks like a variable that nothing replaced: settings are taken as they are written, so write the value itself"
)
_VARIABLE = "[A-Za-z_][A-Za-z0-9_]*"
_BRACED = re.compile(rf"\$\{{{_VARIABLE}[^}}]*\}}|\$\([^)]*\)|\{{\{{.*?\}}\}}")
_BARE = re.compile(rf"\${_VARIABLE}|%{_VARIABLE}%")


def is_unexpanded(text: str, *, separators: str = r"[/:@,]") -> bool:
    """True for `${NAME}`, `$(command)` and `{{ name }}` anywhere, and for `$NAME` and `%NAME%` where they are all
    that stands between two separators: a `$` alone may belong to a value."""
    parts = re.split(separators, text.strip()) if separators else [text.strip()]
    return _BRACED.search(text) is not None or any(_BARE.fullmatch(part) for part in parts)


def split(text: str) -> list[str]:
    """The parts of a comma-separated list, trimmed, without empty ones."""
    return [part for part in map(str.strip, text.split(",")) if part]


def suggestion(found: str, known: Iterable[str]) -> str:
    """`; did you mean x?` for something close to one of the known, else nothing."""
    close = difflib.get_close_matches(found[:SHOWN_CHARACTERS], list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def shown(found: Any) -> str:
    """A value on one line: scalars as JSON, shortened, without the password of a URL; the others by kind."""
    if isinstance(found, dict):
        return "an object"
    if isinstance(found, (list, tuple)):
        return f"a list of {len(found)}"
    if isinstance(found, str):
        return f'"{plain(re.sub(r"(?s)(?<=://).*@", "…@", found))}"'
    return plain(json.dumps(found))


def plain(text: str) -> str:
    """Text from outside made fit for one line of a message."""
    short = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


def json_schema() -> bytes:
    """The JSON Schema of `config.json`, indented."""
    schema = msgspec.json.schema(ConfigFile)
    # The type of the setting is the list only: that is what everybody else gets to see.
    settings = schema["$defs"]["ModelSettings"]["properties"]
    settings["stop"]["type"] = ["string", "array"]
    for setting in settings.values():
        # Only Litestar's reading of the same types needs it.
        setting.pop("extra", None)
    return msgspec.json.format(msgspec.json.encode(schema), indent=2)


def _parsed(path: Path, label: str, origin: str, problems: list[str]) -> Any:
    twice: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice.extend(key for key in found if keys.count(key) > 1)
        return found

    try:
        # -sig: some editors put a byte order mark in front.
        text = files.read_regular(path, MAX_BYTES).decode("utf-8-sig")
        tree = json.loads(text, object_pairs_hook=once)
        json.dumps(tree, ensure_ascii=False).encode()
    except OSError as error:
        problems.append(f"{origin}: cannot be read: {error.strerror or error}")
    except UnicodeDecodeError as error:
        problems.append(f"{label}: not UTF-8 at byte {error.start + 1}")
    except UnicodeEncodeError:
        problems.append(f"{label}: holds half of a character (a \\ud800 to \\udfff without its other half)")
    except json.JSONDecodeError as error:
        problems.append(f"{label}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}")
    except RecursionError:
        problems.append(f"{label}: nested too deeply")
    except ValueError as error:
        # Of a path with a NUL, or of a number with thousands of digits.
        problems.append(f"{label}: cannot be read: {plain(str(error))}")
    else:
        problems.extend(f"{label}: key {shown(key)} stands twice in one object" for key in twice)
        return tree
    return UNSET


class ConfigValidator:
    """Walks a value and its type together and collects what does not fit."""

    def __init__(self, prefix: str, problems: list[str], ignored: list[str]) -> None:
        self._prefix = prefix
        self._problems = problems
        self._ignored = ignored

    def value(self, found: Any, wanted: Any, place: str) -> Any:
        """What was found as the type wants it, or UNSET after telling why not."""
        wanted = without_none(wanted)
        bare = get_args(wanted)[0] if get_origin(wanted) is Annotated else wanted
        if isinstance(bare, type) and issubclass(bare, msgspec.Struct):
            return self._fields(found, bare, place)
        if get_origin(bare) is dict:
            return self._entries(found, bare, place)
        if get_origin(bare) is tuple:
            return self._items(found, wanted, bare, place)
        try:
            return msgspec.convert(found, wanted)
        except msgspec.ValidationError:
            return self._refuse(place, in_words(wanted, found), found)

    def _fields(self, found: Any, wanted: type[msgspec.Struct], place: str) -> Any:
        if not isinstance(found, dict):
            return self._refuse(place, "object", found)
        types = {field.encode_name: field.type for field in msgspec.structs.fields(wanted)}
        values = {}
        for key, value in found.items():
            at = _joined(place, key)
            if key in types:
                if value is not None:
                    values[key] = self.value(value, types[key], at)
            elif MEANINGLESS_KEY.search(key):
                self._ignored.append(at)
            elif key.lower() in SECRETS:
                variable = SECRETS[key.lower()]
                self._problems.append(
                    f"{self._prefix}{at}: a secret; it belongs in .env or the environment, as {variable}"
                )
            else:
                self._problems.append(f"{self._prefix}{at}: unknown key{suggestion(key, types)}")
        return {key: value for key, value in values.items() if value is not UNSET}

    def _entries(self, found: Any, wanted: Any, place: str) -> Any:
        if not isinstance(found, dict):
            return self._refuse(place, "object", found)
        key_type, value_type = get_args(wanted)
        values = {
            self.value(key, key_type, place): self.value(value, value_type, _joined(place, key))
            for key, value in found.items()
            if value is not None
        }
        return {key: value for key, value in values.items() if key is not UNSET and value is not UNSET}

    def _items(self, found: Any, wanted: Any, bare: Any, place: str) -> Any:
        item_type = get_args(bare)[0]
        if isinstance(found, str) and takes_lone_text(wanted):
            found = [found]
        if not isinstance(found, list):
            return self._refuse(place, title(wanted) or "list", found)
        items = [self.value(item, item_type, f"{place}[{index}]") for index, item in enumerate(found)]
        if UNSET in items:
            return UNSET
        try:
            return msgspec.convert(items, wanted)
        except msgspec.ValidationError:
            return self._refuse(place, title(wanted), items)

    def _refuse(self, place: str, allowed: str, found: Any) -> Any:
        at = f"{self._prefix}{place}: " if place else self._prefix
        self._problems.append(f"{at}expected {allowed}, got {shown(found)}")
        return UNSET


def _joined(place: str, key: str) -> str:
    return f"{place}.{plain(key)}" if place else plain(key)
