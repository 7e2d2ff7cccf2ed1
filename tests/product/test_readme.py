"""What the README tells people to type, typed."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

import llamalith_app
from llamalith_app.settings.declaration import VARIABLES
from tests.product.conftest import clean_environ, running

ROOT = Path(llamalith_app.__file__).parent.parent
README = (ROOT / "README.md").read_text()
RECIPES = re.findall(r"^```bash recipe\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
async def test_the_recipes_work_in_their_order(tmp_path: Path) -> None:
    assert len(RECIPES) >= 8
    async with running(tmp_path) as product:
        # `make up` keeps the secrets in ./.env; here they lie beside the data.
        (tmp_path / ".env").symlink_to(product.data_dir / ".env")
        told = []
        for recipe in RECIPES:
            # One terminal for all of them: what the first block set stays set.
            typed = RECIPES[0].partition("\n")[0] + "\n" + recipe.replace("127.0.0.1:8000", f"127.0.0.1:{product.port}")
            shell = await asyncio.create_subprocess_exec(
                *("bash", "-eu", "-o", "pipefail", "-c", typed),
                cwd=tmp_path,
                env=clean_environ(),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            output, complaint = await asyncio.wait_for(shell.communicate(), 60)
            assert shell.returncode == 0, (recipe, output, complaint)
            assert b'"type":"about:llamalith' not in output, (recipe, output)
            told.append(output.decode())
        for job_id in range(1, 6):
            assert (await product.ended(job_id))["status"] == "done"
    assert '"ok":true,"queued":true,"job_id":1,"conversation_id":"dragon","created_new":false' in told[0]
    assert '"status":"done"' in told[1]


def test_every_variable_of_the_configuration_stands_in_the_table() -> None:
    missing = [name for name in VARIABLES if f"`{name}`" not in README]
    assert missing == []


def test_every_variable_stands_in_the_example() -> None:
    example = (ROOT / ".env.example").read_text()
    assert [name for name in VARIABLES if f"{name}=" not in example] == []


def test_every_picture_and_file_that_the_readme_links_to_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) >= 4
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_every_test_that_the_table_of_faults_names_is_there() -> None:
    named = re.findall(r"`(?:(test_\w+\.py))?(?:::)?(test_\w+)?`", (ROOT / "docs" / "faults.md").read_text())
    files: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        files[path.name] = files.get(path.name, "") + path.read_text()
    file, missing = "", []
    for module, test in named:
        file = module or file
        if test and f"def {test}(" not in files[file]:
            missing.append(test)
    assert len(named) > 50
    assert missing == []


def test_the_messages_under_troubleshooting_are_the_real_ones() -> None:
    table = README.partition("## Troubleshooting")[2]
    messages = re.findall(r"^\| .*?`([^`]+)`", table, re.MULTILINE)
    assert len(messages) > 10
    files = [*(ROOT / "llamalith_app").rglob("*.py"), *(ROOT / "templates").iterdir()]
    source = re.sub(r'"\s*f?"', "", "".join(path.read_text() for path in files))
    # What stands for a number, a name or a part that is left out may be anything.
    unknown = [
        message
        for message in messages
        if not all(
            part.strip(" .") in source
            for part in re.split(r"…|\d+|N8N_API_TOKEN: |\(pid N\)|\"x\"|\bseconds\.$", message)
        )
    ]
    assert unknown == []


def test_every_module_stands_on_the_map() -> None:
    """The map in `llamalith_app/__init__.py` names what is there, and nothing that is not."""
    package = Path(llamalith_app.__file__).parent
    there = {path.name for path in package.iterdir() if not path.name.startswith(("_", "."))}
    told = set(re.findall(r"^    (\w+(?:\.py|/))", llamalith_app.__doc__ or "", re.MULTILINE))
    assert {name.rstrip("/") for name in told} == there
