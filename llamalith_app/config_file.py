"""Judges a config.json: every problem in it, each with its path, what was found and what is allowed.

Owns the file's shape, which is the original's with keys added. Reads no environment and knows no defaults of its
own: what it returns is what the file says.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec
from msgspec import Meta

CHAT_FORMATS = (
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
)
"""llama-cpp-python 0.3.36's plain formats; a test holds this equal to its registry."""

INT32_MAX = 2**31 - 1
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]

MODEL_SETTINGS: dict[str, Any] = {
    "n_ctx": Annotated[int, Meta(ge=256, le=INT32_MAX)],
    "n_chunk": Annotated[int, Meta(ge=1, le=4096)],
    "n_threads": Annotated[int, Meta(ge=0, le=512)],
    "n_gpu_layers": Annotated[int, Meta(ge=-1, le=INT32_MAX)],
    "max_tokens": Annotated[int, Meta(ge=1, le=INT32_MAX)],
    "temperature": Annotated[float, Meta(ge=0, le=5)],
    "top_p": Annotated[float, Meta(gt=0, le=1)],
    "top_k": Annotated[int, Meta(ge=0, le=1_000_000)],
    "min_p": Share,
    "typical_p": Annotated[float, Meta(gt=0, le=1)],
    "repeat_penalty": Annotated[float, Meta(gt=0, le=5)],
    "presence_penalty": Penalty,
    "frequency_penalty": Penalty,
    "seed": Annotated[int, Meta(ge=0, le=2**32 - 1)],
}
WORKER_SETTINGS: dict[str, Any] = {"worker_count": Annotated[int, Meta(ge=1, le=64)]}
PLAIN: dict[str, Any] = {
    "redis_url": str,
    "database_url": str,
    "data_dir": str,
    "grammar_dir": str,
    "log_format": str,
    "log_level": str,
    "max_attempts": Annotated[int, Meta(ge=1, le=100)],
}
"""Ours, with the meaning of the environment variables of these names."""
LISTS_AND_MAPS = (
    "available_models",
    "model_paths",
    "model_formats",
    "model_sha256",
    "model_settings",
    "worker_settings",
    "cors_origins",
)
SECRETS = {
    "secret_key": "SECRET_KEY",
    "admin_password_hash": "ADMIN_PASSWORD_HASH",
    "n8n_api_token": "N8N_API_TOKEN",
    "api_token": "N8N_API_TOKEN",
}
MEANINGLESS = re.compile(
    r"story_settings|poll_interval|n_batch|n_ubatch|verbose|(end|eos|stop)_tokens?(_.*)?|.*_?bias(es)?"
)
"""Keys of the original that the engine has no use for; its end tokens come from the GGUF."""

MAX_NAME = 100
MAX_STOPS, MAX_STOP = 16, 64


@dataclass
class FileSettings:
    """What a config.json says, judged; absent keys are absent here."""

    available_models: list[str] | None = None
    model_paths: dict[str, Path] = field(default_factory=dict)
    model_formats: dict[str, str] = field(default_factory=dict)
    model_sha256: dict[str, str] = field(default_factory=dict)
    model_settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    worker_count: int | None = None
    cors_origins: list[str] = field(default_factory=list)
    plain: dict[str, Any] = field(default_factory=dict)
    meaningless: list[str] = field(default_factory=list)
    """Paths of keys that were accepted and do nothing."""


def read(path: Path) -> tuple[FileSettings, list[str]]:
    """What the file says, and its problems, one a line; with problems the settings are not to be used."""
    judge = _Judge(path)
    try:
        data = json.loads(
            path.read_bytes().decode(), object_pairs_hook=judge.object, parse_constant=judge.constant
        )
    except OSError as error:
        judge.problem("", f"cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        judge.problem("", f"is not UTF-8: {error.reason} at byte {error.start}")
    except json.JSONDecodeError as error:
        judge.problem("", f"is not JSON: {error.msg} (line {error.lineno}, column {error.colno})")
    except (RecursionError, ValueError):
        judge.problem("", "is not JSON that can be read: it is nested too deeply or holds a number too long")
    else:
        judge.top(data)
    return judge.found, judge.problems


def schema() -> dict[str, Any]:
    """JSON Schema of the file."""

    def of(kind: Any) -> dict[str, Any]:
        return msgspec.json.schema(kind)

    def closed(properties: dict[str, Any]) -> dict[str, Any]:
        return {"type": "object", "properties": properties, "additionalProperties": False}

    def by_model(of_one: dict[str, Any]) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": of_one}

    stop = {"type": ["string", "array"], "items": {"type": "string"}}
    settings = {name: of(kind) for name, kind in MODEL_SETTINGS.items()} | {"stop": stop}
    formats = {"enum": ["auto", *CHAT_FORMATS]}
    properties = {
        "available_models": of(list[str]),
        "model_paths": by_model({"type": "string"}),
        "model_formats": by_model(formats),
        "model_sha256": by_model({"type": "string", "pattern": "^[0-9a-fA-F]{64}$"}),
        "model_settings": by_model(closed(settings)),
        "worker_settings": closed({name: of(kind) for name, kind in WORKER_SETTINGS.items()}),
        "cors_origins": of(list[str]),
    } | {name: of(kind) for name, kind in PLAIN.items()}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Llamalith's config.json"} | closed(
        properties
    )


def shown(value: object) -> str:
    """A value as JSON, cut to a length that a line bears."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:59] + "…"


def in_words(kind: Any) -> str:
    """What a type takes, in words: `int ≥ 256`, `float from 0 to 5`."""
    base, *metas = get_args(kind) or (kind,)
    word = {int: "int", float: "number", str: "text"}[base]
    for meta in metas:
        low = f"≥ {meta.ge}" if meta.ge is not None else f"> {meta.gt}" if meta.gt is not None else ""
        if meta.le is None or meta.le == INT32_MAX:
            return f"{word} {low}".strip()
        return f"{word} {low} and ≤ {meta.le}"
    return word


def convert(value: object, kind: Any) -> Any:
    """Raises ValueError with what is allowed and what was found."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        raise ValueError(f"expected {in_words(kind)}, got {shown(value)}") from None


def name_problem(name: object) -> str | None:
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME:
        return f"expected a name of 1 to {MAX_NAME} characters, got {shown(name)}"
    if re.search(r"[\x00-\x1f\x7f-\x9f,]", name):
        return f"expected a name without control characters and commas, got {shown(name)}"
    return None


class _Duplicates(dict[str, Any]):
    """An object of the file, with the keys that it gives twice."""

    twice: tuple[str, ...] = ()


class _Judge:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.found = FileSettings()
        self.problems: list[str] = []

    def problem(self, where: str, what: str) -> None:
        self.problems.append(f"{self._path.name}: {where}: {what}" if where else f"{self._path.name}: {what}")

    def object(self, pairs: list[tuple[str, Any]]) -> _Duplicates:
        found = _Duplicates(pairs)
        names = [name for name, _ in pairs]
        found.twice = tuple(dict.fromkeys(name for name in names if names.count(name) > 1)) if len(
            found
        ) < len(pairs) else ()
        return found

    def constant(self, word: str) -> None:
        raise json.JSONDecodeError(f"{word} is no number", word, 0)

    def top(self, data: object) -> None:
        if not isinstance(data, _Duplicates):
            self.problem("", f"expected an object, got {shown(data)}")
            return
        for name, value in self._known(data, "", [*LISTS_AND_MAPS, *PLAIN]):
            if name in PLAIN:
                self._set(name, lambda value=value, name=name: convert(value, PLAIN[name]), self.found.plain, name)
            else:
                getattr(self, f"_{name}")(name, value)
        self._models_without_path()

    def _available_models(self, where: str, value: object) -> None:
        names = self._names(where, value)
        if names is not None:
            self.found.available_models = names

    def _model_paths(self, where: str, value: object) -> None:
        for name, path in self._by_model(where, value):
            if isinstance(path, str) and path and "\0" not in path:
                self.found.model_paths[name] = self._path.parent.absolute() / Path(path).expanduser()
            else:
                self.problem(f"{where}.{name}", f"expected a path, got {shown(path)}")

    def _model_formats(self, where: str, value: object) -> None:
        for name, chosen in self._by_model(where, value):
            if isinstance(chosen, str) and chosen in ("auto", *CHAT_FORMATS):
                self.found.model_formats[name] = chosen
            else:
                self.problem(
                    f"{where}.{name}",
                    f"expected auto or one of {', '.join(CHAT_FORMATS)}, got {shown(chosen)}",
                )

    def _model_sha256(self, where: str, value: object) -> None:
        for name, digest in self._by_model(where, value):
            if isinstance(digest, str) and re.fullmatch(r"[0-9a-fA-F]{64}", digest):
                self.found.model_sha256[name] = digest.lower()
            else:
                self.problem(f"{where}.{name}", f"expected 64 hexadecimal digits, got {shown(digest)}")

    def _model_settings(self, where: str, value: object) -> None:
        for model, settings in self._by_model(where, value):
            if not isinstance(settings, _Duplicates):
                self.problem(f"{where}.{model}", f"expected an object, got {shown(settings)}")
                continue
            found = self.found.model_settings[model] = {}
            at = f"{where}.{model}"
            for name, one in self._known(settings, at, [*MODEL_SETTINGS, "stop"]):
                if name == "stop":
                    self._set(f"{at}.stop", lambda one=one: _stops(one), found, name)
                else:
                    kind = MODEL_SETTINGS[name]
                    self._set(f"{at}.{name}", lambda one=one, kind=kind: convert(one, kind), found, name)

    def _worker_settings(self, where: str, value: object) -> None:
        if not isinstance(value, _Duplicates):
            self.problem(where, f"expected an object, got {shown(value)}")
            return
        found: dict[str, Any] = {}
        for name, one in self._known(value, where, list(WORKER_SETTINGS)):
            kind = WORKER_SETTINGS[name]
            self._set(f"{where}.{name}", lambda one=one, kind=kind: convert(one, kind), found, name)
        self.found.worker_count = found.get("worker_count")

    def _cors_origins(self, where: str, value: object) -> None:
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            self.found.cors_origins = value
        else:
            self.problem(where, f"expected a list of origins, got {shown(value)}")

    def _models_without_path(self) -> None:
        known = set(self.found.available_models or ()) | set(self.found.model_paths)
        for what in ("model_formats", "model_sha256", "model_settings"):
            for name in getattr(self.found, what):
                if known and name not in known:
                    self.problem(f"{what}.{name}", f"there is no such model{_did_you_mean(name, known)}")

    def _known(self, data: _Duplicates, at: str, allowed: list[str]) -> Iterable[tuple[str, Any]]:
        """The entries that are to be judged; tells of the others."""
        for name in data.twice:
            self.problem(_joined(at, name), "given twice")
        for name, value in data.items():
            where = _joined(at, name)
            if name in allowed:
                yield name, value
            elif not at and name.lower() in SECRETS:
                self.problem(where, f"a secret does not belong here; set {SECRETS[name.lower()]} in .env")
            elif MEANINGLESS.fullmatch(name):
                self.found.meaningless.append(where)
            else:
                self.problem(where, f"unknown key{_did_you_mean(name, allowed)}")

    def _by_model(self, where: str, value: object) -> Iterable[tuple[str, Any]]:
        if not isinstance(value, _Duplicates):
            self.problem(where, f"expected an object with a model's name for each key, got {shown(value)}")
            return
        for name in value.twice:
            self.problem(f"{where}.{name}", "given twice")
        for name, one in value.items():
            if (wrong := name_problem(name)) is None:
                yield name, one
            else:
                self.problem(where, wrong)

    def _names(self, where: str, value: object) -> list[str] | None:
        if not isinstance(value, list) or not value:
            self.problem(where, f"expected a list of names, got {shown(value)}")
            return None
        for index, name in enumerate(value):
            if (wrong := name_problem(name)) is not None:
                self.problem(f"{where}[{index}]", wrong)
                return None
            if name in value[:index]:
                self.problem(f"{where}[{index}]", f"{shown(name)} stands here twice")
        return value

    def _set(self, where: str, judged: Callable[[], Any], into: dict[str, Any], name: str) -> None:
        try:
            into[name] = judged()
        except ValueError as error:
            self.problem(where, str(error))


def _stops(value: object) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or len(strings) > MAX_STOPS or not all(
        isinstance(one, str) and 1 <= len(one) <= MAX_STOP and "\0" not in one for one in strings
    ):
        raise ValueError(
            f"expected a text or at most {MAX_STOPS} texts of 1 to {MAX_STOP} characters, got {shown(value)}"
        )
    return tuple(strings)


def _joined(at: str, name: str) -> str:
    told = name if len(name) <= 60 else name[:59] + "…"
    return f"{at}.{told}" if at else told


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
