"""Every setting: defaults < config.json < environment and `.env` -> one frozen `Config`.

The only reader of the environment and of `config.json`. Knows nothing of what the settings are used for;
composition roots (`app.py`, `jobs/worker.py`, `commands/`) call `load()` once and hand parts on.
"""

from __future__ import annotations

from pathlib import Path

import msgspec


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How one model is loaded and how its replies are drawn, unless a job says otherwise."""

    n_ctx: int = 4096
    """Tokens of prompt and reply together that one conversation turn may hold; at least 256."""
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
    grammar_dir: Path = Path()
    """Folder with the GBNF files that `grammar_name` may name; default: the one shipped in the package."""
    log_format: str = "auto"
    """`json`, `text`, or `auto`: text on a terminal, JSON else."""
    log_level: str = "info"
    warnings: tuple[str, ...] = ()
    """Told once at start: keys of the original that mean nothing here."""
