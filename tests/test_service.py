"""The systemd unit that is shipped: what it starts exists, and its times allow a whole drain. And what of nginx.conf no
running nginx shows here."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from llamalith_app.commands.up import command as up_command
from llamalith_app.supervise.up import STOP_MARGIN_S
from tests.needs import need

ROOT = Path(__file__).parents[1]
UNIT = (ROOT / "deploy" / "llamalith.service").read_text()


def setting(name: str) -> str:
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)
    assert isinstance(value, str)
    return value


def test_it_starts_the_command_that_there_is_with_options_that_it_knows() -> None:
    program, subcommand, *arguments = shlex.split(setting("ExecStart"))
    assert (program, subcommand) == ("/opt/llamalith/.venv/bin/llamalith", "up")
    given = up_command.make_context("up", arguments).params
    assert given["data_dir"] == Path(setting("WorkingDirectory"))
    assert given["env_file"] == Path(setting("AssertPathExists"))


def test_systemd_waits_for_a_whole_drain_and_signals_up_alone() -> None:
    _, _, *arguments = shlex.split(setting("ExecStart"))
    grace_s = up_command.make_context("up", arguments).params["grace"]
    # Web and worker get the grace and STOP_MARGIN_S, Valkey STOP_MARGIN_S again.
    assert int(setting("TimeoutStopSec")) > grace_s + 2 * STOP_MARGIN_S
    assert (setting("KillMode"), setting("KillSignal")) == ("mixed", "SIGTERM")


def test_systemd_finds_nothing_wrong_with_it(tmp_path: Path) -> None:
    program = need("systemd-analyze", "systemd")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "llamalith").symlink_to("/bin/true")
    unit = tmp_path / "llamalith.service"
    unit.write_text(UNIT.replace("/opt/llamalith/.venv", str(tmp_path)))
    verified = subprocess.run(
        [program, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False, timeout=60
    )
    ours = [line for line in (verified.stdout + verified.stderr).splitlines() if "llamalith" in line]
    assert (verified.returncode, ours) == (0, [])


def test_nginx_listens_on_ipv6_too() -> None:
    """A browser asks for `localhost` there first, and Debian's default site would answer."""
    ours = re.sub(r"^ *#.*\n", "", (ROOT / "deploy" / "nginx.conf").read_text(), flags=re.MULTILINE)
    assert re.findall(r"^ *listen (.*);$", ours, re.MULTILINE) == ["80", "[::]:80"]
