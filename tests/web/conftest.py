"""The real web application behind a real uvicorn on a free port, without a worker."""

from __future__ import annotations

import asyncio
import functools
import re
import shutil
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import bcrypt
import httpx
import pytest
import pytest_asyncio
import uvicorn.server
from litestar import Litestar

from llamalith_app import app
from llamalith_app.app import Timings
from llamalith_app.grammars import grammar
from llamalith_app.settings.config import Config, ModelConfig
from llamalith_app.web import html

TOKEN = "a-token-of-the-tests"
PASSWORD = "a password of the tests"
# Servers come and go with each test; the templates that they compile stay, and what was found of their grammars, and
# the routes go from one to the next.
html.template_config = functools.cache(html.template_config)
grammar.problem = functools.cache(grammar.problem)


class Impatient:
    """`asyncio` for a server that looks every tenth of a second whether it is to stop and whether its connections are
    gone. Tests stop hundreds."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    @staticmethod
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds / 20)


uvicorn.server.asyncio = Impatient()  # type: ignore[assignment, attr-defined]


class Routes:
    """Hands out applications that no running server has."""

    def __init__(self) -> None:
        self._make = app.routes
        self._free: list[Litestar] = []
        self._taken: Litestar | None = None

    def __call__(self, cors_origins: Sequence[str]) -> Litestar:
        if cors_origins:
            return self._make(cors_origins)
        self._taken = self._free.pop() if self._free else self._make(())
        return self._taken

    def taken(self) -> Litestar | None:
        """The last one that was handed out, once."""
        taken, self._taken = self._taken, None
        return taken

    def new(self) -> Litestar:
        return self._make(())

    def free(self, one: Litestar | None) -> None:
        if one is not None:
            self._free.append(one)


app.routes = ROUTES = Routes()
HASH = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(6)).decode()


def make_config(folder: Path, database_path: Path, redis_url: str) -> Config:
    grammars = folder / "grammars"
    grammars.mkdir()
    (grammars / "yes_or_no.gbnf").write_text('root ::= "yes" | "no"\n')
    return Config(
        data_dir=folder,
        api_token=TOKEN,
        secret_key="a secret key of the tests, of 32 bytes",
        admin_password_hash=HASH,
        models=(
            ModelConfig(name="smollm2", path=folder / "absent.gguf"),
            ModelConfig(name="other", path=folder / "absent.gguf"),
        ),
        redis_url=redis_url,
        database_path=database_path,
        grammar_dir=grammars,
        # Jobs are numbered as they are sent.
        auto_titles=False,
    )


PATIENT = Timings(redis_timeout_s=20, schema_s=600)
"""What gets no processor for a moment is not away."""


@pytest.fixture
def config(tmp_path: Path, database_path: Path, redis_url: str) -> Config:
    return make_config(tmp_path, database_path, redis_url)


@pytest.fixture
def timings() -> Timings:
    """Those of the application; a test that wants others is parametrized with them."""
    return PATIENT


UNDOCUMENTED = {405, 421, 500}
"""Of any route: a method that it does not have, a Host that is not ours, and what nobody foresaw."""


@functools.cache
def documented_answers() -> list[tuple[str, re.Pattern[str], set[int]]]:
    """The method, the path and the statuses of each operation in the OpenAPI document."""
    paths = ROUTES.new().openapi_schema.to_schema()["paths"]
    return [
        (method.upper(), re.compile(re.sub(r"\{[^}]*}", "[^/]+", path)), set(map(int, operation["responses"])))
        for path, methods in sorted(paths.items(), key=lambda item: item[0].count("{"))
        for method, operation in methods.items()
    ]


async def is_documented(answer: httpx.Response) -> None:
    """Whatever a test asks of the API, the OpenAPI document knows the answer."""
    path = answer.request.url.raw_path.decode().partition("?")[0].removeprefix("/chat")
    for method, pattern, statuses in documented_answers():
        if answer.request.method == method and pattern.fullmatch(path):
            assert answer.status_code in statuses | UNDOCUMENTED, f"{method} {path}: {answer.status_code}"
            return


@asynccontextmanager
async def serving(config: Config, timings: Timings = PATIENT, **others: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client whose base is the running application, with the token. `others`: further timings of `create_server`."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = app.create_server(config, timings=timings, **others)
    reused = ROUTES.taken()
    task = asyncio.create_task(server.serve(sockets=[listener]))
    port = listener.getsockname()[1]
    try:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=20,
            trust_env=False,
            # There is no TLS, and certificates take longer to read than most tests take.
            verify=False,
            event_hooks={"response": [is_documented]},
        ) as client:
            yield client
    finally:
        server.should_exit = True
        await task
        listener.close()
        ROUTES.free(reused)


async def log_in(client: httpx.AsyncClient) -> None:
    """As a browser: the token goes, a session comes."""
    client.headers.pop("Authorization", None)
    client.headers["Accept"] = "text/html"
    client.headers["Origin"] = str(client.base_url).rstrip("/")
    answer = await client.post("/chat/login", data={"password": PASSWORD})
    assert answer.status_code == 303, answer.text


@pytest.fixture
async def browser(config: Config, timings: Timings) -> AsyncIterator[httpx.AsyncClient]:
    """A client that is logged in and says where it comes from, as browsers do."""
    async with serving(config, timings) as client:
        await log_in(client)
        yield client


@pytest.fixture
async def api(config: Config, timings: Timings) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(config, timings) as client:
        yield client


@pytest.fixture(scope="module")
def module_config(migrated: Path, tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Config:
    folder = tmp_path_factory.mktemp("web")
    return make_config(folder, Path(shutil.copy(migrated, folder / "llamalith.db")), valkey_url)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_api(config: Config) -> AsyncIterator[httpx.AsyncClient]:
    """One server for all tests of a module: it says `config, api = module_config, module_api` and marks its tests with
    `asyncio(loop_scope="module")`."""
    async with serving(config) as client:
        yield client
