"""The image and compose.yaml: valid, closed, and in step with what the program itself says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from ruamel.yaml import YAML

from llamalith_app import __version__, cli
from llamalith_app.commands import healthcheck, web, worker
from llamalith_app.jobs.worker.process import TIMINGS
from llamalith_app.settings.declaration import CONFIDENTIAL_VARIABLES, VARIABLES
from llamalith_app.supervise import valkey
from scripts import pip_install

ROOT = Path(__file__).parents[1]
COMPOSE: dict[str, Any] = YAML(typ="safe").load(ROOT / "compose.yaml")
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]
OF_THE_SYSTEM = {"HOME", "PATH", "PYTHONDONTWRITEBYTECODE", "SQLITE_TMPDIR"}
"""What the image sets for Python, SQLite and the shell; everything else must be a setting of ours."""


class Instruction(NamedTuple):
    name: str
    rest: str


def instructions() -> Iterator[Instruction]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            name, rest = line.split(maxsplit=1)
            yield Instruction(name, rest)


DOCKERFILE = list(instructions())
FINAL = DOCKERFILE[max(i for i, instruction in enumerate(DOCKERFILE) if instruction.name == "FROM") :]


def last(name: str) -> str:
    """The one that counts: of the image, and the last of its kind."""
    return [instruction.rest for instruction in FINAL if instruction.name == name][-1]


def pairs(name: str, stage: list[Instruction]) -> dict[str, str]:
    return {
        key: value.strip('"')
        for instruction in stage
        if instruction.name == name
        for key, value in re.findall(r'([\w.]+)=("[^"]*"|\S*)', instruction.rest)
    }


def seconds(text: str) -> float:
    found = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", text)
    assert found is not None
    return 60 * int(found[1] or 0) + int(found[2] or 0)


def default(command: Any, name: str) -> Any:
    return next(parameter.default for parameter in command.params if parameter.name == name)


def test_compose_yaml_is_valid_by_the_specification() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_web_and_worker_run_from_one_image_on_one_volume() -> None:
    assert OURS == ["web", "worker"]
    for key in ("image", "build", "environment", "env_file", "volumes"):
        assert SERVICES["web"][key] == SERVICES["worker"][key]
    data = f"data:{SERVICES['web']['environment']['LLAMALITH_DATA_DIR']}"
    assert data in SERVICES["web"]["volumes"]
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service["volumes"]}
    assert used == {"./models", *COMPOSE["volumes"]}


def test_the_data_directory_is_the_images_one_writable_place() -> None:
    data_dir = SERVICES["web"]["environment"]["LLAMALITH_DATA_DIR"]
    assert data_dir == pairs("ENV", FINAL)["LLAMALITH_DATA_DIR"]
    assert json.loads(last("VOLUME")) == [data_dir]


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_is_closed(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["tmpfs"] == "/tmp"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert service.keys().isdisjoint({"cap_add", "network_mode", "pid", "ipc", "privileged", "devices"})


def test_nobody_is_root() -> None:
    uid, gid = last("USER").split(":")
    assert int(uid) > 0
    assert int(gid) > 0
    assert f"--uid {uid} " in next(rest for name, rest in FINAL if name == "RUN" and "useradd" in rest)
    assert f"--owner={uid} --group={gid} " in next(rest for name, rest in FINAL if name == "RUN" and "install" in rest)
    assert all("user" not in SERVICES[name] for name in OURS)
    assert all(int(number) > 0 for number in SERVICES["valkey"]["user"].split(":"))


def test_a_container_gets_more_time_to_end_than_a_worker_takes_to_drain() -> None:
    drain_s = default(worker.command, "grace") + 2 * TIMINGS.give_back_s
    assert seconds(SERVICES["worker"]["stop_grace_period"]) > drain_s


def test_every_variable_that_is_set_is_a_setting() -> None:
    image = pairs("ENV", FINAL).keys() - OF_THE_SYSTEM
    given = {name for service in OURS for name in SERVICES[service]["environment"]}
    assert image | given <= set(VARIABLES)
    assert "environment" not in SERVICES["valkey"]


def test_no_secret_is_in_the_image_or_in_compose_yaml() -> None:
    set_in_image = pairs("ENV", DOCKERFILE).keys() | pairs("ARG", DOCKERFILE).keys()
    assert set_in_image.isdisjoint(CONFIDENTIAL_VARIABLES)
    for name in OURS:
        given = {key: value for key, value in SERVICES[name]["environment"].items() if key in CONFIDENTIAL_VARIABLES}
        assert given.keys() == {"REDIS_URL"}
        assert urlsplit(given["REDIS_URL"]).password is None
        assert SERVICES[name]["env_file"] == ".env"


def test_only_what_is_named_enters_the_build() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*"
    named = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    assert set(rules) == {"*", "**/__pycache__", *(f"!{name}" for name in named)}
    assert {Path(name).parts[0] for name in named} == {
        *("LICENSE", "README.md", "pyproject.toml"),
        *("llamalith_app", "requirements", "scripts", "static", "templates"),
    }


@pytest.mark.parametrize("name", OURS)
def test_a_service_runs_and_is_asked_by_commands_that_there_are(name: str) -> None:
    service = SERVICES[name]
    assert json.loads(last("ENTRYPOINT")) == ["llamalith"]
    command = service.get("command", json.loads(last("CMD")))
    assert command[0] == name
    assert command[0] in cli.SUBCOMMANDS
    how, program, subcommand, part = service["healthcheck"]["test"]
    assert (how, program, part) == ("CMD", "llamalith", name)
    assert subcommand in cli.SUBCOMMANDS
    assert part in healthcheck.command.commands
    assert seconds(service["healthcheck"]["timeout"]) > healthcheck.TIMEOUT_S


def test_the_image_asks_as_compose_asks_the_web() -> None:
    options, command = last("HEALTHCHECK").split(" CMD ")
    asked = SERVICES["web"]["healthcheck"]
    assert ["CMD", *json.loads(command)] == asked["test"]
    for key in ("interval", "timeout", "start_period"):
        assert f"--{key.replace('_', '-')}={asked[key]}" in options.split()


def test_the_web_is_reachable_from_this_machine_alone_at_its_port() -> None:
    port = default(web.command, "port")
    assert {name: service["ports"] for name, service in SERVICES.items() if "ports" in service} == {
        "web": [f"127.0.0.1:{port}:{port}"]
    }
    assert int(last("EXPOSE")) == default(healthcheck.web, "port") == port


def test_both_wait_for_the_queue_that_redis_url_names() -> None:
    assert urlsplit(SERVICES["web"]["environment"]["REDIS_URL"]).hostname == "valkey"
    for name in OURS:
        assert SERVICES[name]["depends_on"] == {"valkey": {"condition": "service_healthy"}}
    assert "test" in SERVICES["valkey"]["healthcheck"]


def test_valkey_keeps_what_the_embedded_one_keeps() -> None:
    embedded = valkey.argv(Path("valkey-server"), folder=Path("/data"), socket=Path("/s"))
    program, *options = SERVICES["valkey"]["command"]
    assert program == "valkey-server"
    assert len(options) == 8
    for i in range(0, len(options), 2):
        assert options[i : i + 2] == embedded[embedded.index(options[i]) :][:2]


def test_the_image_builds_what_is_locked_and_llama_cpp_as_make_does() -> None:
    runs = " ".join(rest for name, rest in DOCKERFILE if name == "RUN")
    locks = set(re.findall(r"-r (requirements/\S+\.lock)", runs))
    assert locks == {f"requirements/{name}.lock" for name in ("build", "runtime", "model")}
    assert len(re.findall(r"-r requirements/", runs)) == runs.count("--require-hashes")
    assert "requirements/model.sha256" in runs
    definition = "CMAKE_PROJECT_llama_cpp_INCLUDE="
    assert definition in Path(pip_install.__file__).read_text()
    assert f"{definition}/src/scripts/llama.cmake" in runs


def test_the_image_says_which_version_it_holds() -> None:
    assert pairs("LABEL", FINAL)["org.opencontainers.image.version"] == __version__
