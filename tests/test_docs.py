"""docs/cli.md is the commands' own help, generated: `python -m tests.test_docs` writes it anew."""

import click

from edge_gemma.cli.main import cli
from edge_gemma.quant.recipes import RECIPES
from tests import ROOT

CLI_PAGE = ROOT / "docs" / "cli.md"
HEAD = """\
# The command line

Generated from `--help`; do not edit. `python -m tests.test_docs` writes it anew.

With `--json` a command prints one object on standard output; progress and notes go to standard error. Exit codes: 0, 1
for an error told in one line on standard error, 2 for usage, 130 after Ctrl-C.
"""


def cli_page() -> str:
    """The whole page."""
    sections = [HEAD]
    for path, command in [((), cli), *(((name,), cli.commands[name]) for name in sorted(cli.commands))]:
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
    for command in cli.commands.values():
        assert command.help
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or parameter.help, (command.name, parameter.name)


if __name__ == "__main__":
    CLI_PAGE.write_text(cli_page(), encoding="utf-8")
