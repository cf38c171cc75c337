"""What help says: whole lines in the order of a newcomer's path, and every value that an option takes."""

import re
from typing import get_args

import pytest
import typer
from typer.testing import CliRunner

from optiscope.cli import app
from optiscope.cli import schedule as schedule_command
from optiscope.cli.app import ORDER
from optiscope.diagnostics.schedules.allocation import RULES
from optiscope.diagnostics.schedules.deriving import SPLITS

COMMANDS = typer.main.get_command(app)


def help_of(*command, width=80):
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": str(width)})
    assert result.exit_code == 0
    return result.stdout


def test_commands_are_listed_as_a_newcomer_meets_them():
    assert set(COMMANDS.commands) == set(ORDER)
    listed = re.findall(r"^  ([\w-]+)  ", help_of().partition("Commands:")[2], re.MULTILINE)
    assert listed == list(ORDER) == ["demo", "run", "info", "check", "report", "analyze", "schedule", "what-if", "compare", "ns", "verify"]


def test_every_line_of_help_is_whole_at_eighty_columns():
    text = help_of()
    assert "..." not in text.partition("Commands:")[2]
    assert all(len(line) <= 80 for line in text.splitlines())
    for name in ORDER:
        # The line in the list is all of the first paragraph.
        first = COMMANDS.commands[name].help.strip().split("\n\n")[0]
        assert re.search(rf"^  {name} +{re.escape(first.removesuffix('.'))}\.?$", text, re.MULTILINE), name
        own = help_of(name)
        assert all(len(line) <= 80 for line in own.splitlines())
        assert "list[" not in own.partition("Options:")[2] or name == "ns"


CHOICES = [
    (("check",), "fail_on", ("info", "warning", "error")),
    (("schedule",), "rule", tuple(RULES)),
    (("schedule",), "split", SPLITS),
    (("what-if",), "rule", ("mean", "minimax")),
    (("ns", "validate"), "after_last", ("repeat", "cycle", "exact")),
]


@pytest.mark.parametrize(("command", "option", "values"), CHOICES, ids=lambda value: value if isinstance(value, str) else None)
def test_an_option_names_its_values_and_refuses_others_with_the_list(diag, tmp_path, command, option, values):
    found = COMMANDS
    for name in command:
        found = found.commands[name]
    [parameter] = [p for p in found.params if p.name == option]
    assert all(re.search(rf"\b{value}\b", parameter.help) for value in values)
    (tmp_path / "x").touch()
    result = diag(*command, tmp_path / "x", f"--{option.replace('_', '-')}", "nothing")
    assert (result.exit_code, result.stdout) == (2, "")
    told = " ".join(result.stderr.split())
    assert f"--{option.replace('_', '-')}" in told
    assert "not one of " + ", ".join(f"'{value}'" for value in values) in told


def test_the_values_are_those_that_are_on_offer():
    assert get_args(schedule_command.Rule) == tuple(RULES)
    assert get_args(schedule_command.Split) == SPLITS
