"""A run that went back: `diag info` tells of what it held before, and every command that reads a run shows it on request."""

import shutil

import pytest
from typer.main import get_command

from optiscope.cli import app
from optiscope.diagnostics.store.forking import fork
from optiscope.diagnostics.store.writer import Writer


@pytest.fixture(scope="module")
def run(recorded, tmp_path_factory):
    """The run of 12 steps, gone back to step 6, with nothing recorded since."""
    path = shutil.copytree(recorded, tmp_path_factory.mktemp("lineages") / "run.zarr")
    fork(Writer(path, {}), 6)
    return path


def test_info_lists_them(diag, run, strict_json):
    lines = diag("info", run).stdout.splitlines()
    assert "lineage 0: left after step 6, 6 records of its own, to step 12" in lines
    assert "lineage 1: the newest, 6 records of its own, to step 6; shown here" in lines
    assert "update: 6 records, steps 1 to 6" in lines
    lines = diag("info", run, "--lineage", 0).stdout.splitlines()
    assert "lineage 0: left after step 6, 6 records of its own, to step 12; shown here" in lines
    assert "update: 12 records, steps 1 to 12" in lines
    assert strict_json(diag("info", run, "--json").stdout)["lineages"] == [
        {"lineage": 0, "after": 6, "last_step": 12, "records": 6}, {"lineage": 1, "after": None, "last_step": 6, "records": 6},
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["info", "check", "analyze", "schedule", "report", "compare"])
def test_a_lineage_that_there_is_not(diag, run, recorded, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = diag(command, run, *([recorded] if command == "compare" else []), "--lineage", 2)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"diag: lineage: {run} has none of number 2; it has 0 to 1, the newest\n"
    assert list(tmp_path.iterdir()) == []


def test_what_was_left_is_analysed_as_the_run_was(diag, run, recorded, tmp_path):
    for name, arguments in (("of", (recorded,)), ("left", (run, "--lineage", 0))):
        result = diag("analyze", *arguments, "--study", "kappa_by_operator", "-o", tmp_path / name)
        assert result.exit_code == 0
    tables = [sorted((tmp_path / name).rglob("*.csv")) for name in ("of", "left")]
    assert [path.name for path in tables[0]] == [path.name for path in tables[1]] != []
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*tables, strict=True))


def test_every_command_that_reads_a_run_has_the_option():
    options = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in get_command(app).commands.items()
        if name != "verify" and any(parameter.metavar and "RUN.zarr" in parameter.metavar for parameter in command.params)
    }
    assert {"info", "analyze", "check", "schedule", "report", "compare"} <= options.keys()
    assert [name for name, own in options.items() if "--lineage" not in own] == []
