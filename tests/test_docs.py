"""The documents against what they tell of: commands, links, anchors, rooms.

docs/cli.md is the commands' own help, generated: `python -m tests.test_docs` writes it anew.
"""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import edge_gemma
from edge_gemma.cli.main import cli
from edge_gemma.quant.recipes import RECIPES
from tests import ROOT
from tests.test_imports import ROOMS

CLI_PAGE = ROOT / "docs" / "cli.md"
HEAD = """\
# The command line

Generated from `--help`; do not edit. `python -m tests.test_docs` writes it anew.

With `--json` a command prints one object on standard output; progress and notes go to standard error. Exit codes: 0, 1
for an error told in one line on standard error, 2 for usage, 130 after Ctrl-C.
"""


def commands(path: tuple[str, ...] = (), group: click.Group = cli) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """All commands with the words that call them, each group before its own."""
    yield path, group
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands((*path, name), command)
        else:
            yield (*path, name), command


def cli_page() -> str:
    """The whole page."""
    sections = [HEAD]
    for path, command in commands():
        name = " ".join(("edge-gemma", *path))
        context = click.Context(command, info_name=name, terminal_width=100, **cli.context_settings)
        sections.append(f"## {name}\n\n```\n{command.get_help(context)}\n```\n")
    return "\n".join(sections)


def test_the_cli_page_is_current():
    # click's releases differ in where they break lines
    assert CLI_PAGE.read_text(encoding="utf-8").split() == cli_page().split(), "run: python -m tests.test_docs"


def test_the_help_names_every_recipe():
    recipe = next(option for option in cli.commands["export"].params if option.name == "recipe")
    assert set(recipe.metavar.split("|")) == set(RECIPES)


def test_every_command_has_a_purpose_and_every_option_an_explanation():
    for _, command in commands():
        assert command.help
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or parameter.help, (command.name, parameter.name)


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
LOG = (ROOT / "docs" / "LOG.md").read_text(encoding="utf-8")
ENTRY = re.compile(r'(<a id="([a-z0-9-]+)"></a>\n\n)?## \d{4}-\d\d-\d\d: .*\n\n(.*)')


def anchors(page: str) -> set[str]:
    """What a link into a page can name: explicit anchors, and headings as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    spelt = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return spelt | set(re.findall(r'<a id="([^"]+)">', page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_what_a_page_tells_to_run_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for names in re.findall(r"pip install [^\n`]*\[([\w,]+)\]", text):
        assert set(names.split(",")) <= set(extras), names
    for script in re.findall(r"python (\w[\w/]*\.py)", text):
        assert (ROOT / script).exists(), script
    for module in re.findall(r"python -m ((?:tests|training|edge_gemma)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir(), module
    for target in re.findall(r"\bmake (chat|check|docs|test[\w-]*)", text):
        assert f"\n{target}: " in (ROOT / "Makefile").read_text(), target


@pytest.mark.parametrize("name", ["docs/ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_files_that_are_named_are_there(name: str) -> None:
    named = re.findall(r"`([\w/.]+)`|[ `](tests/[\w/.]+)", (ROOT / name).read_text(encoding="utf-8"))
    for path in {first or second for first, second in named if "/" in (first or second)}:
        assert (ROOT / path).exists() or (ROOT / "edge_gemma" / path).exists(), path


def test_there_is_one_version_and_the_changelog_begins_with_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "edge_gemma.__version__"}
    versions = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert edge_gemma.__version__ in [version for version in versions if version != "Unreleased"][:1]


def test_the_rooms_are_told_in_their_order() -> None:
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = page.split("## The rooms")[1].split("`training/`")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [room for room in ROOMS if room != "__main__"]


def test_every_entry_of_the_log_has_an_anchor_a_verdict_and_a_place_in_the_index() -> None:
    index = LOG.split("## By topic")[1].split("<a id=")[0]
    entries = [match.groups() for match in ENTRY.finditer(LOG)]
    assert len(entries) == len(re.findall(r"^## \d{4}-", LOG, re.MULTILINE)) > 30
    for _, anchor, verdict in entries:
        assert anchor, verdict
        assert all(f"**{word}" in verdict for word in ("Tried:", "Result:", "Kept?")), anchor
        assert f"(#{anchor})" in index, anchor


def test_code_cites_entries_of_the_log() -> None:
    folders = ("edge_gemma", "export", "quant", "training", "tests", "benchmarks")
    for path in (file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        cited = re.findall(r"docs/LOG\.md(?:#([\w-]+))?", path.read_text(encoding="utf-8"))
        if name != "tests/test_docs.py":
            assert set(cited) <= anchors(LOG), name


if __name__ == "__main__":
    CLI_PAGE.write_text(cli_page(), encoding="utf-8")
