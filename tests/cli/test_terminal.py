"""What reaches the terminal: quickly, whole, and harmless whatever a run's names hold."""

import subprocess
import sys

import pytest

from optiscope.diagnostics.escape import escaped


def test_help_loads_nothing_heavy():
    code = "import sys\nfrom optiscope.cli import app\ntry: app(['--help'])\nfinally: print(*sys.modules, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: " in result.stdout
    assert all(command in result.stdout for command in ("info", "analyze", "schedule", "check", "demo"))
    assert not {"torch", "xarray", "seaborn", "matplotlib", "pandas", "zarr", "numpy"} & set(result.stderr.split())


HOSTILE = "[bold]x[/bold]\x1b[2J\x9b1m:warning:\u202e\\"
SHOWN = "[bold]x[/bold]\\x1b[2J\\x9b1m:warning:\\u202e\\"


@pytest.fixture(scope="module")
def hostile(record, tmp_path_factory):
    """A run whose matrices and operators are named with markup, escape sequences and an emoji's code; it has a finding."""
    path = tmp_path_factory.mktemp("hostile") / "[red]run.zarr"
    return record(path, names=(HOSTILE,), operators=lambda name: HOSTILE if "bold" in name else None, ns_steps=0, steps=2)


def test_names_of_a_run_are_printed_as_they_are(diag, hostile):
    info, check = diag("info", hostile), diag("check", hostile)
    for result in (info, check):
        assert "\x1b" not in result.stdout
        assert "\x9b" not in result.stdout
        assert "\u202e" not in result.stdout
    assert info.stdout.startswith(f"{hostile}: begun ")
    assert any(line.split()[0] == SHOWN for line in info.stdout.splitlines())
    assert f"({SHOWN}.weight)" in check.stdout


def test_names_stay_themselves_in_json(diag, hostile, strict_json):
    assert strict_json(diag("info", hostile, "--json").stdout)["operators"][1]["operator"] == HOSTILE
    assert strict_json(diag("check", hostile, "--json").stdout)["findings"][0]["matrices"] == [f"{HOSTILE}.weight"]


def test_errors_are_inert_too(diag, tmp_path):
    result = diag("info", tmp_path / "[bold]\x1b[2J.zarr")
    assert "[bold]\\x1b[2J.zarr" in result.stderr
    assert "\x1b" not in result.stderr


def test_a_narrow_terminal_cuts_nothing(diag, record, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    long = "operator_" * 12
    out = diag("info", record(tmp_path / "run.zarr", steps=1, operators={"q_proj": long})).stdout
    assert "…" not in out
    # The name goes on in the lines below it.
    assert long in "".join(line[:40].split("  ")[0].strip() for line in out.splitlines()).replace("\n", "")


@pytest.mark.parametrize("text", ["attn_q", "κ ε̃ √ × – 語", "a b", "[bold]", ":warning:"])
def test_ordinary_text_is_left_alone(text):
    assert escaped(text) == text
