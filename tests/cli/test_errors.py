"""Bad input: one clear sentence on standard error, exit code 2, and a traceback only when asked for."""

import json
import shutil

import pytest

from optiscope.diagnostics.store.format import seal


@pytest.fixture(scope="module")
def bad(recorded, record, tmp_path_factory):
    """A folder with every kind of run that cannot be read, and one good one."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "folder").mkdir()
    (folder / "folder" / "notes.txt").write_text("mine")
    (folder / "file.zarr").write_text("mine")
    record(folder / "empty.zarr", steps=0)
    record(folder / "adam.zarr", muon=False, steps=2)
    for name in ("newer", "killed", "garbled", "good"):
        shutil.copytree(recorded, folder / f"{name}.zarr")
    for name, change in (
        ("newer", lambda document: document["attributes"].update(optiscope_schema=99)),
        (
            "killed",
            lambda document: (
                document.pop("consolidated_metadata"),
                [document["attributes"].pop(name) for name in ("checksum", "chunks", "writer")],
            ),
        ),
    ):
        path = folder / f"{name}.zarr" / "zarr.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))
    for chunks in list((folder / "killed.zarr").rglob("step/c")):
        shutil.rmtree(chunks)
    for chunk in (folder / "garbled.zarr").rglob("c/**/0"):
        if chunk.is_file():
            chunk.write_bytes(b"garbled")
    return folder


UNREADABLE = {
    "missing.zarr": "nothing found at",
    "folder": "is not an Optiscope run",
    "file.zarr": "is not an Optiscope run",
    "newer.zarr": " with schema 99; this version reads up to ",
    "empty.zarr": "records",
    "killed.zarr": "records",
    "garbled.zarr": "",
}


def assert_one_sentence(result, part):
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("diag: ")
    assert len(result.stderr.splitlines()) == 1
    assert part in result.stderr


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("run", UNREADABLE)
@pytest.mark.parametrize("command", ["info", "analyze", "schedule", "check"])
def test_a_run_that_cannot_be_read(diag, bad, tmp_path, monkeypatch, command, run, options):
    if command == "info" and run in ("empty.zarr", "killed.zarr"):
        # What is in them is: nothing yet. That is an answer.
        assert diag(command, bad / run, *options).exit_code == 0
        return
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(diag(command, bad / run, *options), UNREADABLE[run])
    assert list(tmp_path.iterdir()) == []
    assert not (bad / f"{run.removesuffix('.zarr')}-analysis").exists()


ARGUMENTS = {
    "--window: expected FIRST:LAST in optimizer steps, for example 20:100, got '20'": ["schedule", "good.zarr", "--window", "20"],
    "--window: expected FIRST:LAST in optimizer steps, for example 20:100, got 'a:b'": ["schedule", "good.zarr", "--window", "a:b"],
    "--window: expected FIRST:LAST in optimizer steps, for example 20:100, got '1:2:3'": ["schedule", "good.zarr", "--window", "1:2:3"],
    "window: no spectrum recorded in that range of steps; the run's records go from 1 to 12": ["schedule", "good.zarr", "--window", "13:"],
    "budget: expected a step count of 3 to 8, got 9": ["schedule", "good.zarr", "--budget", "9"],
    "family: expected one of matched, jordan, polar_express, cubic, ": ["schedule", "good.zarr", "--family", "aol_flash"],
    "run: no optimizer in it orthogonalises (Muon does)": ["schedule", "adam.zarr"],
    "budget: expected a step count of 3 to 8, got 2": ["what-if", "good.zarr", "--budget", "2"],
    "--what-if: expected as a command of its own: diag what-if good.zarr": ["schedule", "good.zarr", "--what-if", "--by-operator"],
    "--window: expected FIRST:LAST in optimizer steps, for example 20:100, got '7'": ["what-if", "good.zarr", "--window", "7"],
    "family: expected one of matched, jordan": ["what-if", "good.zarr", "--family", "none"],
    "run: no optimizer in it orthogonalises (Muon does), ": ["what-if", "adam.zarr"],
    "--study: nothing is none of kappa_vs_residual, ": ["analyze", "good.zarr", "--study", "nothing"],
    "run: no optimizer in it orthogonalises": ["analyze", "adam.zarr", "--study", "residual_curves"],
}


@pytest.mark.parametrize("message", ARGUMENTS)
def test_a_wrong_argument_is_named(diag, bad, monkeypatch, message):
    monkeypatch.chdir(bad)
    assert_one_sentence(diag(*ARGUMENTS[message]), message)
    assert not (bad / "schedule.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["schedule", "good.zarr", "--budget", "many"],
        ["check", "good.zarr", "--fail-on", "nothing"],
        ["info"],
        ["nothing"],
        ["info", "--nothing", "x"],
    ],
)
def test_what_the_parser_refuses_exits_with_two(diag, bad, monkeypatch, arguments):
    monkeypatch.chdir(bad)
    result = diag(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr
    assert "Traceback" not in result.stderr


def test_output_that_cannot_be_written(diag, bad, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_one_sentence(diag("analyze", bad / "good.zarr", "-o", tmp_path / "file", "--study", "kappa_by_layer"), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"
    assert_one_sentence(diag("schedule", bad / "good.zarr", "-o", tmp_path / "none" / "s.json"), str(tmp_path / "none"))


def test_debug_shows_the_traceback_once_asked_for(diag, bad):
    result = diag("--debug", "info", bad / "folder")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert result.stderr.splitlines()[-1].startswith("diag: run: ")
    # And not in the next call of the same process.
    assert_one_sentence(diag("info", bad / "folder"), "is not an Optiscope run")


def test_a_damaged_run_ends_in_a_sentence_too(diag, bad, tmp_path):
    shutil.copytree(bad / "good.zarr", tmp_path / "run.zarr")
    document = json.loads((tmp_path / "run.zarr" / "zarr.json").read_text())
    del document["consolidated_metadata"]["metadata"]["geometry/operator"]
    (tmp_path / "run.zarr" / "zarr.json").write_text(json.dumps(document))
    assert_one_sentence(diag("check", tmp_path / "run.zarr"), "zarr.json: its checksum does not match")
    document["attributes"]["checksum"] = seal(document)
    (tmp_path / "run.zarr" / "zarr.json").write_text(json.dumps(document))
    assert_one_sentence(diag("check", tmp_path / "run.zarr"), "there is no operator")


def test_an_error_that_is_none_of_ours_ends_in_a_sentence_too(diag, bad, monkeypatch):
    def fail(path, lineage):
        raise KeyError("operator")

    monkeypatch.setattr("optiscope.analysis.open_run", fail)
    result = diag("check", bad / "good.zarr")
    assert_one_sentence(result, "unexpected KeyError: 'operator'; the run may be damaged (diag --debug shows where)")


def test_a_message_of_several_lines_becomes_one(diag, bad, monkeypatch):
    def fail(path, lineage):
        raise ValueError("first\n  second \x1b[2J")

    monkeypatch.setattr("optiscope.analysis.open_run", fail)
    result = diag("info", bad / "good.zarr")
    assert (result.exit_code, result.stderr) == (2, "diag: first second \\x1b[2J\n")
