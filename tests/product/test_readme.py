"""The commands of README and docs/, typed; and what they say of fields, settings, messages and files, compared
with the code."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest

import llamalith_app
from llamalith_app.contracts.jobs import Job, JobCreate, Progress
from llamalith_app.contracts.parameters import Parameters
from llamalith_app.settings import ranges
from llamalith_app.settings.declaration import VARIABLES, ConfigFile, ModelSettings
from tests.product.conftest import WITH_SHARED, Product, clean_environ, configure, running
from tests.settle import eventually

ROOT = Path(llamalith_app.__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
PAGES = {"README.md": README} | {f"docs/{path.name}": path.read_text() for path in sorted(DOCS.glob("*.md"))}
API, CONFIGURATION = PAGES["docs/api.md"], PAGES["docs/configuration.md"]
RECIPES = {
    name: found
    for name, text in PAGES.items()
    if (found := re.findall(r"^```bash recipe\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
}
EXPECTED = {
    "README.md": ["done"] * 3,
    "docs/api.md": [*["done"] * 4, "cancelled", *["done"] * 4],
}
"""How each page's jobs end, in their order."""


def rows(text: str) -> dict[str, str]:
    """The rows of a page's tables, by each name in the first cell; the first one of a name."""
    found = re.findall(r"^\| (`.*?) \|(.*)\|$", text, re.MULTILINE)
    return {name: rest for cell, rest in reversed(found) for name in re.findall(r"`([^`]+)`", cell)}


async def typed(recipe: str, first: str, product: Product, folder: Path) -> str:
    # One terminal for all of a page's recipes: what the first block set stays set.
    text = first.partition("\n")[0] + "\n" + recipe.replace("127.0.0.1:8000", f"127.0.0.1:{product.port}")
    shell = await asyncio.create_subprocess_exec(
        *("bash", "-eu", "-o", "pipefail", "-c", text),
        cwd=folder,
        env=clean_environ(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, complaint = await asyncio.wait_for(shell.communicate(), 60)
    assert shell.returncode == 0, (recipe, output, complaint)
    assert b'"type":"about:llamalith' not in output, (recipe, output)
    return output.decode()


@pytest.mark.slow
@pytest.mark.parametrize("page", RECIPES)
async def test_the_recipes_of_a_page_work_in_their_order(page: str, tmp_path: Path) -> None:
    recipes, expected = RECIPES[page], EXPECTED[page]
    configure(tmp_path, max_tokens=60)
    async with running(tmp_path) as product:
        # `make up` keeps the secrets in ./.env; here they lie beside the data.
        (tmp_path / ".env").symlink_to(product.data_dir / ".env")
        shown = [await typed(recipe, recipes[0], product, tmp_path) for recipe in recipes]
        assert [(await product.ended(n))["status"] for n in range(1, len(expected) + 1)] == expected
        paths = (await product.api.get("/api/openapi.json")).json()["paths"]
    if page == "docs/api.md":
        routes = {(method.upper(), re.sub(r"{\w+}", "{id}", path)) for path in paths for method in paths[path]}
        documented = {
            (name.partition(" ")[0], re.sub(r"{\w+}", "{id}", name.partition(" ")[2]))
            for name in rows(API)
            if re.match(r"[A-Z]+ /", name)
        }
        of_openai = {route for route in routes if route[1].startswith("/v1/")}
        assert documented == {*(routes - of_openai), ("GET", "/api/openapi.json")}
        for method, path in of_openai:
            assert re.search(rf"{re.escape(path.rpartition('/')[2])}", PAGES["docs/openai.md"]), (method, path)
    if page == "README.md":
        assert '"ok":true,"queued":true,"job_id":1,"conversation_id":"dragon","created_new":false' in shown[0]
        assert '"status":"done"' in shown[1]


def filled_in(expression: str, given: dict[str, Any]) -> str:
    """What n8n makes of a text with `{{ $json.a.b }}` in it."""

    def value(found: re.Match[str]) -> str:
        encoded, path = re.fullmatch(r"(encodeURIComponent\()?\$json\.([\w.]+)\)?", found[1]).groups()  # type: ignore[union-attr]
        here: Any = given
        for name in path.split("."):
            here = here[name]
        return quote(str(here), safe="") if encoded else str(here)

    return re.sub(r"\{\{ (.*?) \}\}", value, expression)


@pytest.mark.slow
@WITH_SHARED
async def test_the_n8n_recipe_works_in_its_second_round_and_later(product: Product) -> None:
    section = README.partition("### 3. Ask from n8n")[2].partition("\n### ")[0]
    ask, look = re.findall(r"(?:POST|GET) `http://127\.0\.0\.1:8000([^`]+)`", section)
    (switch,) = re.findall(r"\*\*Switch\*\* on `([^`]+)`", section)
    reply, reason = re.findall(r"`(\{\{ \$json\.last_(?:assistant|job\.error).*?\}\})`", section)
    given = (await product.api.post(ask, json={"content": "Say hello."})).json()
    first, rounds = given["job_id"], 0

    async def look_again() -> bool:
        nonlocal given, rounds
        given = (await product.api.get(filled_in(look, given))).json()
        rounds += 1
        return rounds > 1 and filled_in(switch, given) == "done"

    await eventually(look_again, within_s=60)
    assert filled_in(reply, given) == (await product.job(first))["result"]
    second = await product.submit("x", conversation_id=given["conversation_id"], timeout_s=0.001)
    await product.ended(second)
    given = (await product.api.get(filled_in(look, given))).json()
    assert (filled_in(switch, given), filled_in(reason, given)) == ("error", given["last_job"]["result"])


def test_the_readme_is_short_and_sends_readers_on() -> None:
    assert len(README.splitlines()) <= 250
    assert [
        name for name in PAGES if name.startswith("docs/") and f"({name})" not in README and "index" not in name
    ] == []


def test_the_index_lists_every_page_and_the_glossary_first() -> None:
    listed = re.findall(r"^\d+\. \[.*?\]\((.*?)\)", PAGES["docs/index.md"], re.MULTILINE)
    assert listed[0] == "glossary.md"
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md") if path.name != "index.md")


def test_the_glossary_defines_each_term_once_in_one_sentence() -> None:
    terms = re.findall(r"^\| \*\*(.+?)\*\* \| (.+) \|$", PAGES["docs/glossary.md"], re.MULTILINE)
    assert len(terms) > 50
    assert len({term for term, _ in terms}) == len(terms)
    assert [term for term, meaning in terms if not re.fullmatch(r"[^.]+(?:[.][\w4][^.]*)*\.", meaning)] == []


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_picture_file_and_section_that_a_page_links_to_is_there(page: str) -> None:
    folder = (ROOT / page).parent
    missing = []
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if "://" in link:
            continue
        file, _, section = link.partition("#")
        target = (folder / file).resolve() if file else ROOT / page
        if not target.is_file() or (section and section not in anchors(target.read_text())):
            missing.append(link)
    assert missing == []


def test_every_variable_of_the_configuration_is_in_the_table() -> None:
    assert [name for name in VARIABLES if name not in rows(CONFIGURATION)] == []


def test_every_variable_stands_in_the_example() -> None:
    example = (ROOT / ".env.example").read_text()
    assert [name for name in VARIABLES if f"{name}=" not in example] == []


def test_every_key_of_config_json_is_in_a_table_and_its_defaults_are_the_real_ones() -> None:
    fields = [*msgspec.structs.fields(ConfigFile), *msgspec.structs.fields(ModelSettings)]
    documented = rows(CONFIGURATION)
    assert [field.encode_name for field in fields if field.encode_name not in {"$schema", *documented}] == []
    for field in msgspec.structs.fields(ModelSettings):
        if field.name not in Parameters.__struct_fields__ and field.default is not None:
            default = documented[field.name].rpartition("|")[2]
            assert re.match(rf"`?{json.dumps(field.default)}\b".replace('"', ""), default.strip()), field.name


def test_the_examples_of_config_json_are_valid() -> None:
    examples = re.findall(r"^```json config\n(.*?)^```", CONFIGURATION, re.MULTILINE | re.DOTALL)
    assert len(examples) >= 4
    for example in examples:
        config = msgspec.json.decode(example, type=ConfigFile, strict=True)
        names = set(config.available_models or ())
        assert names == set(config.model_paths or {}) == set(config.model_settings or {})


def test_the_memory_of_the_worked_examples_follows_from_the_formula() -> None:
    found = re.findall(
        r"^\| (\d+) GB \| .*? \| ([\d.]+) GB \| (\d+) KiB \| (\d+) . ([\d,]+) \| ([\d.]+) GB of ([\d.]+) GB \|$",
        CONFIGURATION,
        re.MULTILINE,
    )
    assert len(found) == 3
    for machine, file, kib, slots, context, memory, budget in found:
        need = float(file) + int(slots) * int(context.replace(",", "")) * int(kib) * 1024 / 1e9 + 0.15
        assert need == pytest.approx(float(memory), abs=0.1)
        assert float(budget) == pytest.approx(0.8 * int(machine))
        assert need < float(budget)


def test_every_field_that_a_job_takes_or_shows_is_in_a_table_of_the_api() -> None:
    documented = rows(API)
    for shape in (JobCreate, Job, Progress):
        assert [name for name in shape.__struct_fields__ if name not in documented] == [], shape


def test_the_ranges_of_the_api_are_those_of_the_types() -> None:
    documented = rows(API)
    for field in msgspec.structs.fields(Parameters):
        if field.name not in {"stop", "response_format", "reasoning_effort", "chat_template_kwargs"}:
            assert f"| {documented[field.name].split('|')[0].strip()} |" == (
                f"| {ranges.in_words(ranges.without_none(field.type))} |"
            ), field.name


def test_every_test_that_the_table_of_faults_names_is_there() -> None:
    named = re.findall(r"`(?:(test_\w+\.py))?(?:::)?(test_\w+)?`", PAGES["docs/faults.md"])
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
    messages = [
        message
        for cell in re.findall(r"^\| (.*?) \| ", PAGES["docs/troubleshooting.md"], re.MULTILINE)
        for message in re.findall(r"`([^`]{12,})`", cell)
    ]
    assert len(messages) > 20
    files = [*(ROOT / "llamalith_app").rglob("*.py"), *(ROOT / "templates").iterdir(), ROOT / "scripts" / "venv.sh"]
    source = re.sub(r'"\s*f?"', "", "".join(path.read_text() for path in files))
    # What stands for a number, a name or a part that is left out may be anything.
    unknown = [
        message
        for message in messages
        if message not in OF_OTHERS
        and not all(
            part.strip(' .:"') in source
            for part in re.split(r"…|\d+|N8N_API_TOKEN: |make: |\(pid N\)|\"x\"|\"\w+\":|\bseconds\.$", message)
        )
    ]
    assert unknown == []


OF_OTHERS = {"Assertion failed", r"<\|im_start\|>"}
"""Messages of systemd and of models."""


def test_every_module_stands_on_the_map() -> None:
    """The map in `llamalith_app/__init__.py` names what is there, and nothing that is not."""
    package = Path(llamalith_app.__file__).parent
    there = {path.name for path in package.iterdir() if not path.name.startswith(("_", "."))}
    documented = set(re.findall(r"^    (\w+(?:\.py|/))", llamalith_app.__doc__ or "", re.MULTILINE))
    assert {name.rstrip("/") for name in documented} == there
