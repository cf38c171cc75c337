"""The lists in docs/ hold what the code has, no more and no less."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from optiscope.analysis import STUDIES
from optiscope.analysis.report.drawable import LONGEST, MAX_DRAWN
from optiscope.cli.console import ROWS
from optiscope.diagnostics.newton_schulz.families import FAMILIES
from optiscope.diagnostics.newton_schulz.validation import of_family
from optiscope.diagnostics.schedules.allocation import MAX_GROUPS

ROOT = Path(__file__).parents[1]


def rows(path):
    """Names in backquotes in the first column of every table row."""
    lines = (ROOT / "docs" / path).read_text(encoding="utf-8").splitlines()
    return [name for line in lines if line.startswith("| `") for name in re.findall(r"`(\w+)`", line.split("|")[1])]


def test_every_study_is_listed_with_its_question():
    assert rows("studies.md") == list(STUDIES)
    text = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    for name in (*(f"studies.{study}" for study in STUDIES), "compare"):
        assert import_module(f"optiscope.analysis.{name}").QUESTION in text


def test_every_finding_is_listed():
    calls = [
        node
        for path in (ROOT / "analysis" / "findings").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding"
    ]
    assert len(calls) > 20
    assert sorted(rows("findings.md")) == sorted({ast.literal_eval(call.args[0]) for call in calls})


def test_every_family_is_listed_with_its_hazards():
    lines = [
        line.split(" | ") for line in (ROOT / "docs" / "families.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    ]
    assert [line[0].strip("| `") for line in lines] == list(FAMILIES)
    for (_, steps, _, _, hazards, notes), family in zip(lines, FAMILIES.values(), strict=True):
        found = of_family(family).hazards
        assert int(steps) == family.steps
        assert hazards == (", ".join(h.rule for h in found if h.severity != "info") or "–")
        assert notes.rstrip(" |") == (", ".join(h.rule for h in found if h.severity == "info") or "–")


@pytest.mark.parametrize("page", sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))))
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http:", "https:", "#"))]
    assert [link for link in targets if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_security_page_names_what_exists_and_invents_no_address():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert all((ROOT / path).exists() for path in re.findall(r"`((?:tests|docs)/[\w/.]+)`", text))
    assert "@" not in text.replace("`@`", "")
    # Its numbers are those in force.
    for value, words in ((1_000, "words of more than {:,} characters"), (ROWS, "tables and lists of `info` end after {:,} rows"), (LONGEST, "cut at {} characters"),
                         (MAX_DRAWN, "{} operators are drawn"), (MAX_GROUPS, "refused beyond {} operators")):  # fmt: skip
        assert words.format(value) in text


@pytest.mark.parametrize("page", ["docs/walkthrough.md", "CONTRIBUTING.md"])
def test_files_that_are_named_are_there(page):
    """By the end of their path, as the pages name them; folders with a slash at their end."""
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", (ROOT / page).read_text(encoding="utf-8")))
    assert len(named) > 3
    folders = ("diagnostics", "hooks", "analysis", "cli", "benchmarks", "examples", "tests", "docs")
    paths = [path for folder in folders for path in ((ROOT / folder), *(ROOT / folder).rglob("*")) if "__pycache__" not in path.parts]
    there = {f"/{path.relative_to(ROOT)}{'/' if path.is_dir() else ''}" for path in paths}
    assert [name for name in named if not any(path.endswith(f"/{name}") for path in there)] == []
