"""`llamalith healthcheck` as a container runtime runs it: the exit code and the one line of output."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from sqlalchemy import Engine

from llamalith_app.commands import healthcheck
from llamalith_app.jobs.worker.sweep import hold_lock
from llamalith_app.store import workers
from tests.store.samples import NOW

pytestmark = pytest.mark.slow

HERE = socket.gethostname()


def ask(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llamalith_app.cli", "healthcheck", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | variables,
    )


def result(run: subprocess.CompletedProcess[str]) -> tuple[int, str]:
    """The exit code and the one line, wherever it was printed."""
    return run.returncode, run.stdout + run.stderr


@contextmanager
def answering(status: int) -> Iterator[int]:
    """The port of a server that answers /healthz with this status, and everything else with 404."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def register(engine: Engine, lock_path: Path, host: str = HERE) -> int:
    with engine.begin() as connection:
        return workers.register(
            connection, host=host, pid=1, lock_path=str(lock_path), models=["m"], n_slots=1, now=NOW
        )


def test_a_web_that_answers_is_alive_even_if_a_proxy_is_configured() -> None:
    with answering(200) as port:
        run = ask("web", "--port", str(port), http_proxy="http://127.0.0.1:1")
    assert result(run) == (0, f"http://127.0.0.1:{port}/healthz: answers\n")


def test_a_web_that_answers_an_error_is_not_healthy() -> None:
    with answering(500) as port:
        run = ask("web", "--port", str(port))
    assert result(run) == (1, f"http://127.0.0.1:{port}/healthz: answers 500\n")


def test_a_web_that_does_not_run_is_reported_in_one_line() -> None:
    with socket.socket() as closed:
        # Bound without listening: nobody else can be given the port.
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        assert result(ask("web", "--port", str(port))) == (1, f"http://127.0.0.1:{port}/healthz: Connection refused\n")


@pytest.mark.parametrize(
    ("sent", "timeout_s", "reason"), [(b"", 0.2, "timed out"), (b"nonsense\r\n\r\n", 20, "nonsense")]
)
def test_a_web_that_hangs_or_speaks_no_http_is_not_healthy(sent: bytes, timeout_s: float, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.sendall(sent)
                while peer.recv(1024):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(healthcheck.Unhealthy, match=reason):
            healthcheck.check_web(server.getsockname()[1], timeout_s)
        thread.join()


def test_a_worker_that_holds_its_lock_is_alive_however_old_its_heartbeat(engine: Engine, database_path: Path) -> None:
    lock_path = database_path.with_name("worker.lock")
    worker_id = register(engine, lock_path)
    with hold_lock(lock_path):
        assert result(ask("worker", "--data-dir", str(database_path.parent))) == (0, f"worker {worker_id} is alive\n")


def test_a_worker_whose_lock_is_free_or_gone_is_dead_however_new_its_heartbeat(
    engine: Engine, database_path: Path
) -> None:
    lock_path = database_path.with_name("worker.lock")
    hold_lock(lock_path).close()
    register(engine, lock_path)
    register(engine, database_path.with_name("gone.lock"))
    run = ask("worker", "--data-dir", str(database_path.parent))
    assert result(run) == (1, "no worker of this machine is alive\n")


def test_a_worker_of_another_machine_on_the_same_volume_does_not_count(engine: Engine, database_path: Path) -> None:
    lock_path = database_path.with_name("worker.lock")
    register(engine, lock_path, host="elsewhere")
    with hold_lock(lock_path):
        run = ask("worker", "--data-dir", str(database_path.parent))
    assert result(run) == (1, "no worker of this machine is alive\n")


def test_a_worker_that_has_stopped_is_not_alive(engine: Engine, database_path: Path) -> None:
    lock_path = database_path.with_name("worker.lock")
    worker_id = register(engine, lock_path)
    with engine.begin() as connection:
        workers.end(connection, worker_id, NOW)
    with hold_lock(lock_path):
        run = ask("worker", "--data-dir", str(database_path.parent))
    assert result(run) == (1, "no worker of this machine is alive\n")


def test_a_missing_or_unreadable_database_is_reported_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "llamalith.db"
    assert result(ask("worker", "--data-dir", str(tmp_path))) == (1, f"{path}: unable to open database file\n")
    path.write_text("no database" * 100)
    assert result(ask("worker", "--data-dir", str(tmp_path))) == (1, f"{path}: file is not a database\n")


def test_a_configuration_that_no_worker_starts_with_is_reported_in_one_line(tmp_path: Path) -> None:
    code, line = result(ask("worker", "--data-dir", str(tmp_path), LLAMALITH_MAX_ATTEMPTS="many", LLAMALITH_X="1"))
    assert (code, line.count("\n")) == (1, 1)
    assert "LLAMALITH_MAX_ATTEMPTS" in line
    assert "LLAMALITH_X" in line


def test_it_imports_neither_the_web_framework_nor_sqlalchemy_nor_llama_cpp() -> None:
    code = "import sys, llamalith_app.commands.healthcheck; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    never = {"litestar", "llama_cpp", "redis", "saq", "sqlalchemy", "structlog", "uvicorn"}
    assert never.isdisjoint(run.stdout.split())
