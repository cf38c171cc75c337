"""The table of acceptance tests in the documentation names tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "docs" / "acceptance.md").read_text(encoding="utf-8").splitlines()
ROWS = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in LINES if line.startswith("|")][2:]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_every_test_named_in_a_row_exists(row):
    system, shown_by, what = row
    assert system
    assert what
    named = re.findall(r"`([^`]+)::([^`]+)`", shown_by)
    assert named
    assert len(named) == len(shown_by.split("<br>"))
    for file, test in named:
        defined = {node.name for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}
        assert test.startswith("test_")
        assert test in defined, f"{file} has no {test}"


def test_every_system_has_one_row():
    systems = [row[0] for row in ROWS]
    assert len(set(systems)) == len(systems) >= 25
