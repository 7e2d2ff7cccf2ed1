"""What the program reads of its settings: one frozen `Config`.

`load.py` makes it; `declaration.py` declares what people set. Knows nothing of what the settings are used for:
composition roots (`app.py`, `jobs/worker/process.py`, `commands/`) load it once and hand parts on.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from llamalith_app.settings.declaration import ModelSettings, Settings

GRAMMARS = Path(__file__).parents[1] / "grammars"


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    path: Path | None = None
    """The GGUF file. It need not exist at start: a job for it then ends as an error that names it. None: the model is
    no file of this machine."""
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


class Config(Settings, frozen=True, kw_only=True):
    """The settings as they are used, and what is derived from them."""

    data_dir: Path
    """Absolute; database, Valkey's files, locks and logs live under it."""
    models: tuple[ModelConfig, ...] = ()
    """The models offered, in order; the first is the default."""
    redis_url: str = ""
    """As redis-py takes it; default: the embedded Valkey's socket under `data_dir`."""
    embedded_redis: bool = True
    """True if no REDIS_URL was given."""
    database_path: Path = Path()
    """The SQLite file: DATABASE_URL (`sqlite:///…`), else `data_dir/llamalith.db`."""
    n_slots: int | None = None
    """Jobs that a loaded model runs side by side unless its own settings say so: worker_settings.worker_count. None: as
    many as cores and memory are good for."""
    grammar_dir: Path = GRAMMARS
    """Folder with the GBNF files that `grammar_name` may name; default: the one shipped in the package."""
    env_file: Path | None = None
    """The `.env` that was read; None: there was none."""
    config_path: Path | None = None
    """The `config.json` that was read."""
    from_environment: tuple[str, ...] = ()
    """Names of the variables that the environment itself sets, over `.env` and `config.json`."""
    warnings: tuple[str, ...] = ()
    """Logged once at start: what has no effect, or another one than it seems to have."""
