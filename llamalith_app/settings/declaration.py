"""Every setting, declared once: its key in `config.json`, its variable, its type with limits, default and description.

Derived from these structs: what a `config.json` may contain and its JSON Schema, how the environment is parsed, the
error texts, and the fields of `Config`. So a new setting is one field here. Knows nothing of where values come from and
what they are used for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_origin

import msgspec
from msgspec import Meta

from llamalith_app.settings import ranges
from llamalith_app.settings.formats import (
    PATH,
    AllowedHost,
    ChatFormat,
    DatabaseUrl,
    Hsts,
    ModelName,
    Network,
    Origin,
    PathText,
    Reasoning,
    RedisUrl,
    Sha256,
)


class Env(NamedTuple):
    """The environment variable that sets the same."""

    name: str
    is_secret: bool = False
    """The value is a secret, or may contain a password."""
    in_file: bool = True
    """False: `config.json` must not contain it."""


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
            description="Whether thinking at the beginning of a reply is kept apart from it; auto: where the model's"
            " family is known."
        ),
    ] = "auto"
    reasoning: Annotated[
        Reasoning,
        Meta(
            description="Which markers stand around the model's thinking; auto: those that its chat template or"
            " vocabulary knows; none: its thinking stays in its reply."
        ),
    ] = "auto"
    thinking_budget: (
        Annotated[
            int,
            Meta(
                ge=0,
                le=1_048_576,
                description="Tokens that the thinking may take before it is ended. Unset: any number, or half of"
                " max_tokens where a grammar waits for its end.",
            ),
        ]
        | None
    ) = None
    parse_special_in_content: Annotated[
        bool,
        Meta(
            description="Whether the text of a control token, such as <|im_end|>, is that token also where somebody"
            " typed it. Then whoever sends a prompt can forge messages."
        ),
    ] = False
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


class MaxWait(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds that a job of each class waits at most for another model's jobs, or those of a class before its own."""

    interactive: ranges.LongSeconds = 30.0
    normal: ranges.LongSeconds = 120.0
    batch: ranges.LongSeconds = 900.0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that are used as they are given: `Config` has them under the same names."""

    api_token: Annotated[
        str, Meta(description="The token that programs send."), Env("N8N_API_TOKEN", is_secret=True, in_file=False)
    ] = ""
    secret_key: Annotated[
        str, Meta(description="Signs sessions and form tokens."), Env("SECRET_KEY", is_secret=True, in_file=False)
    ] = ""
    admin_password_hash: Annotated[
        str,
        Meta(description="bcrypt hash of the admin password."),
        Env("ADMIN_PASSWORD_HASH", is_secret=True, in_file=False),
    ] = ""
    cors_origins: Annotated[
        tuple[Origin, ...], Meta(description="Origins of browsers that may call."), Env("LLAMALITH_CORS_ORIGINS")
    ] = ()
    trusted_proxies: Annotated[
        tuple[Network, ...],
        Meta(description="Proxies whose X-Forwarded-For and -Proto count; unset: none."),
        Env("LLAMALITH_TRUSTED_PROXIES"),
    ] = ()
    allowed_hosts: Annotated[
        tuple[AllowedHost, ...],
        Meta(description="Hosts under which requests are answered, with or without a port; unset: all."),
        Env("LLAMALITH_ALLOWED_HOSTS"),
    ] = ()
    hsts: Annotated[
        Hsts, Meta(description="Seconds of Strict-Transport-Security over https; unset: none."), Env("LLAMALITH_HSTS")
    ] = ""
    max_attempts: Annotated[
        ranges.MaxAttempts,
        Meta(description="Times that a job is tried when its engine or worker dies."),
        Env("LLAMALITH_MAX_ATTEMPTS"),
    ] = 3
    timeout_s: (
        Annotated[
            ranges.Seconds,
            Meta(description="Seconds that a job may run, loading included; unset: as long as it takes."),
            Env("LLAMALITH_TIMEOUT_S"),
        ]
        | None
    ) = None
    queue_timeout_s: (
        Annotated[
            ranges.Seconds,
            Meta(description="Seconds that a job may wait for its first start; unset: as long as it takes."),
            Env("LLAMALITH_QUEUE_TIMEOUT_S"),
        ]
        | None
    ) = None
    retention_days: (
        Annotated[
            float,
            Meta(gt=0, le=36_500, description="Days that a job and its turn are kept after its end; unset: for ever."),
            Env("LLAMALITH_RETENTION_DAYS"),
        ]
        | None
    ) = None
    v1_keep_days: (
        Annotated[
            float,
            Meta(gt=0, le=36_500, description="The same for jobs of OpenAI clients; unset: as for all others."),
            Env("LLAMALITH_V1_KEEP_DAYS"),
        ]
        | None
    ) = None
    v1_client_gone: Annotated[
        Literal["cancel", "continue"],
        Meta(
            description="What becomes of a job whose OpenAI client left before its answer: cancelled after"
            " v1_grace_s, or run to its end."
        ),
        Env("LLAMALITH_V1_CLIENT_GONE"),
    ] = "cancel"
    v1_grace_s: Annotated[
        ranges.LongSeconds,
        Meta(description="Seconds within which the same request finds the job that its client left."),
        Env("LLAMALITH_V1_GRACE_S"),
    ] = 15.0
    restore_days: Annotated[
        float,
        Meta(ge=0, le=36_500, description="Days that a deleted conversation can be restored; then it is removed."),
        Env("LLAMALITH_RESTORE_DAYS"),
    ] = 1.0
    auto_titles: Annotated[
        bool,
        Meta(description="Whether a job writes a title for each conversation of the page, after its first reply."),
        Env("LLAMALITH_AUTO_TITLES"),
    ] = True
    memory_budget_mb: (
        Annotated[
            int,
            Meta(ge=1, le=2**30, description="MiB that loaded models may take together; unset: 80 % of the machine's."),
            Env("LLAMALITH_MEMORY_BUDGET_MB"),
        ]
        | None
    ) = None
    idle_unload_s: Annotated[
        ranges.LongSeconds,
        Meta(description="Seconds without work after which a model that is not pinned is unloaded; 0: never."),
    ] = 600.0
    state_cache_mb: Annotated[
        int, Meta(ge=0, le=2**30, description="MiB on disk for computed prompts; 0: none are kept.")
    ] = 2048
    max_wait_s: MaxWait = MaxWait()
    max_queued: Annotated[int, Meta(ge=1, le=10**9, description="Jobs of one owner that may wait at once.")] = 100_000
    log_format: Annotated[
        Literal["auto", "json", "text"],
        Meta(description="auto: text on a terminal, else JSON."),
        Env("LLAMALITH_LOG_FORMAT"),
    ] = "auto"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="The least severe lines that are logged."),
        Env("LLAMALITH_LOG_LEVEL"),
    ] = "info"


class UnresolvedSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that something is made of first: absolute paths, the address of Redis, the models."""

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
    data_dir: (
        Annotated[PathText, Meta(description="Where all state lives; ./data."), Env("LLAMALITH_DATA_DIR")] | None
    ) = None
    database_url: (
        Annotated[
            DatabaseUrl,
            Meta(description="Unset: llamalith.db in the data directory."),
            Env("DATABASE_URL", is_secret=True),
        ]
        | None
    ) = None
    redis_url: (
        Annotated[RedisUrl, Meta(description="Unset: a Valkey of its own."), Env("REDIS_URL", is_secret=True)] | None
    ) = None
    grammar_dir: (
        Annotated[
            PathText, Meta(description="Folder with *.gbnf; unset: the one shipped."), Env("LLAMALITH_GRAMMAR_DIR")
        ]
        | None
    ) = None


def _env(wanted: Any) -> Env | None:
    """The variable that a type names, if it names one."""
    for member in ranges.members(wanted):
        if get_origin(member) is Annotated:
            return next((found for found in member.__metadata__ if isinstance(found, Env)), None)
    return None


_FIELDS = [*msgspec.structs.fields(UnresolvedSettings), *msgspec.structs.fields(Settings)]
_ENVS = {field.name: env for field in _FIELDS if (env := _env(field.type))}

TYPES: Mapping[str, Any] = {field.name: ranges.without_none(field.type) for field in _FIELDS}
"""By key."""
PATH_KEYS = tuple(key for key, wanted in TYPES.items() if PATH in ranges.metas(wanted))
SECRET_KEYS = {key: env.name for key, env in _ENVS.items() if not env.in_file}
"""The variables of the settings that `config.json` must not contain, by field."""
KEYS_OF_VARIABLES = {env.name: key for key, env in _ENVS.items() if env.in_file}
"""The keys of `config.json` that a variable can set, too."""
VARIABLES = (*SECRET_KEYS.values(), "LLM_MODELS", "LLAMALITH_CONFIG", *KEYS_OF_VARIABLES)
"""All of the environment that is read as a setting."""
CONFIDENTIAL_VARIABLES = tuple(env.name for env in _ENVS.values() if env.is_secret)

# A value of null is the same as none, at every key.
ConfigFile: Any = msgspec.defstruct(
    "ConfigFile",
    [
        ("schema", str | None, msgspec.field(name="$schema", default=None)),
        *(
            (field.name, field.type | None, None if field.default == "" else field.default)
            for field in _FIELDS
            if field.name not in SECRET_KEYS
        ),
    ],
    namespace={
        "__doc__": "Llamalith's configuration. Relative paths start at this file's folder; null is the same as not set."
    },
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
)
"""What may stand in a `config.json`: every setting but the secrets."""
