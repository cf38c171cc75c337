"""`diag report`: the page of a real run, and what goes wrong before there is one."""

import os
import re
import subprocess
import sys

import pytest


def test_the_page_of_the_demo(diag, demo, tmp_path, strict_json):
    path = tmp_path / "report.html"
    result = diag("report", demo[0] / "demo.zarr", "-o", path, "--json")
    assert result.exit_code == 0
    told = strict_json(result.stdout)
    assert told["report"] == str(path)
    assert told["size"] == path.stat().st_size
    assert told["size"] < 5e6
    assert set(told["findings"]) == {"error", "warning", "info"}
    text = path.read_text(encoding="utf-8")
    assert "<title>demo.zarr – Optiscope report</title>" in text
    markup = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert len(markup) < len(text) - 1e6  # the plotting library is in it
    assert re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", markup) == []


def test_the_same_run_gives_the_same_page_in_another_process(recorded, tmp_path):
    pages = []
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.html"
        command = [sys.executable, "-W", "error", "-m", "optiscope.cli", "report", str(recorded), "-o", str(path)]
        code = f"import sys; from optiscope.cli import app; sys.argv = {['diag', *command[5:]]!r}; app()"
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
        pages.append(path.read_bytes())
    assert pages[0] == pages[1]


def test_two_runs_give_one_page(diag, recorded, record, tmp_path):
    other = record(tmp_path / "other.zarr", steps=6)
    result = diag("report", recorded, other, "-o", tmp_path / "both.html")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"report: {tmp_path / 'both.html'}, ")
    assert "<title>run.zarr and other.zarr – Optiscope report</title>" in (tmp_path / "both.html").read_text(encoding="utf-8")


def test_runs_of_the_same_name_are_told_apart(diag, recorded, record, tmp_path):
    (tmp_path / "b").mkdir()
    other = record(tmp_path / "b" / "run.zarr", steps=2)
    assert diag("report", recorded, other, "-o", tmp_path / "both.html").exit_code == 0
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert f"<title>{recorded} and {other} – " in text


def test_an_older_page_is_replaced(diag, recorded, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    assert diag("report", recorded, "-o", path).exit_code == 0
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("folder", "--output: folder is a folder; give a file's name, for example folder/report.html"),
        ("none/r.html", "--output: the folder none does not exist; make it, or write elsewhere"),
    ],
)
def test_where_no_page_can_be_written(diag, recorded, tmp_path, monkeypatch, output, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    result = diag("report", recorded, "-o", output)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"diag: {message}\n")


def test_the_same_run_twice_is_no_comparison(diag, recorded, tmp_path):
    result = diag("report", recorded, recorded, "-o", tmp_path / "r.html")
    assert result.exit_code == 2
    assert result.stderr.startswith("diag: runs: expected different ones, got ")


def test_a_run_that_cannot_be_read_leaves_no_page(diag, tmp_path):
    result = diag("report", tmp_path / "missing.zarr", "-o", tmp_path / "r.html", "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "nothing found at" in result.stderr
    assert list(tmp_path.iterdir()) == []
