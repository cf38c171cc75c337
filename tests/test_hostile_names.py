"""A run whose every name means harm, shown by every command: the terminal, JSON, tables, pictures and the page show text, and nothing else happens."""

import csv
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from hostile_names import HOSTILE
from typer.testing import CliRunner

from optiscope.cli import app
from optiscope.diagnostics.escape import escaped, json_text, shortened, storable
from optiscope.diagnostics.store.whole_file import write_whole

STUDIES = (
    "kappa_by_operator",
    "rms_alignment",
    "weight_decay",
    "efficiency_table",
)  # a colour, a row, a panel per operator; texts among attributes


def call(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (0, 1), result.stderr
    return result


def strict(text):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def plain(text):
    """Whether nothing but line ends steers what shows the text."""
    return all(c == "\n" or c.isprintable() for c in text)


@pytest.fixture(scope="module")
def files(hostile_run, tmp_path_factory):
    """What every command that writes wrote, with nothing beside it; the folder holds a copy of the run too."""
    folder = tmp_path_factory.mktemp("written")
    run = folder / hostile_run.name
    shutil.copytree(hostile_run, run)
    here, before = os.getcwd(), set(folder.parent.iterdir())
    os.chdir(folder)
    try:
        call("analyze", run.name, *(part for study in STUDIES for part in ("--study", study)))
        call("schedule", run.name)
        call("what-if", run.name, "-o", "what-if.csv", "--family", "jordan")
        call("compare", run.name, hostile_run, "-o", "compared")
    finally:
        os.chdir(here)
    assert set(folder.parent.iterdir()) == before
    assert {path.name for path in folder.iterdir()} == {
        run.name, run.name.removesuffix(".zarr") + "-analysis", "schedule.json", "what-if.csv", "compared",
    }  # fmt: skip
    return folder


COMMANDS = {
    "info": ["info"],
    "check": ["check"],
    "schedule": ["schedule", "-o", os.devnull],
    "what_if": ["what-if", "--by-operator", "--family", "jordan"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_terminal_is_not_steered(hostile_run, command):
    name, *options = COMMANDS[command]
    result = call(name, hostile_run, *options)
    assert plain(result.stdout)
    assert plain(result.stderr)
    # As it is, or cut: nothing fills the screen.
    assert "xxx…xxx" in result.stdout or command != "info"
    assert max(map(len, result.stdout.split()), default=0) < 2_000


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_strict_and_holds_the_true_names(hostile_run, command):
    name, *options = COMMANDS[command]
    text = call(name, hostile_run, "--json", *options).stdout
    assert plain(text)
    document = strict(text)
    if command == "info":
        stored = {storable(operator) for operator in HOSTILE.values()}
        assert {one["operator"] for one in document["operators"]} >= stored
        group = document["optimizers"][0]["groups"][0]
        assert group[HOSTILE["image"]] == HOSTILE["attribute"]
        assert group["a\\ud800b"] == "a\\ud800b"  # no file holds half a pair


def test_a_schedule_file_holds_the_true_names_and_is_read_again(files):
    from optiscope.diagnostics import Schedule

    text = (files / "schedule.json").read_text(encoding="utf-8")
    assert plain(text)
    assert set(strict(text)["operators"]) == set(Schedule.load(files / "schedule.json").operators)
    assert set(Schedule.load(files / "schedule.json").operators) <= {storable(operator) for operator in HOSTILE.values()}
    for options in ([], ["--json"]):
        assert plain(call("ns", "validate", files / "schedule.json", *options).stdout)


def test_no_cell_of_a_table_is_a_formula(files):
    tables = sorted(files.rglob("*.csv"))
    assert len(tables) > 8
    texts = set()
    for path in tables:
        content = path.read_text(encoding="utf-8")
        assert plain(content)
        header, *rows = csv.reader(io.StringIO(content), strict=True)
        assert all(len(row) == len(header) for row in rows)
        texts |= {cell for row in [header, *rows] for cell in row}
    assert {"'" + HOSTILE[key] for key in ("equals", "plus", "minus", "at")} <= texts
    assert HOSTILE["quotes"] in texts
    for text in texts:
        if text.lstrip()[:1] in "=+-@" and text.strip():
            float(text)  # a number


def test_every_picture_is_one_of_reasonable_size(files):
    from PIL import Image

    pictures = sorted(path for path in files.rglob("*.png") if not any(parent.suffix == ".zarr" for parent in path.parents))
    assert {path.stem for path in pictures} == {*STUDIES, "compare"}
    for path in pictures:
        with Image.open(path) as picture:
            assert max(picture.size) < 2_500
            assert len(picture.convert("L").getcolors()) > 50  # not blank


def test_every_picture_can_be_drawn_of_what_would_be_a_formula(build_labels):
    texts = list(HOSTILE.values())
    for start in range(0, len(texts), 15):
        build_labels(["attn_q", *texts[start : start + 15]]).draw_without_rendering()


@pytest.fixture
def build_labels():
    """A figure of the operators, as a study draws one."""
    import numpy as np
    import xarray as xr

    from optiscope.analysis.figures import axes, finish, operator_lines
    from optiscope.analysis.report.drawable import drawable

    def build_labels(operators):
        dataset = xr.Dataset(
            {"size": (("step", "operator"), np.ones((2, len(operators))))},
            coords={"step": [1, 2], "operator": np.array(operators, dtype=object)},
        )
        dataset = drawable(dataset.assign_attrs(title=operators[1]))
        figure, (ax,) = axes()
        operator_lines(ax, dataset, "size")
        finish(ax, title=dataset.attrs["title"], x="step", y="size")
        assert len(ax.get_legend().get_texts()) == len(operators)  # those that begin with an underscore too
        return figure

    return build_labels


def test_many_operators_are_drawn_as_far_as_there_is_room():
    import numpy as np
    import xarray as xr

    from optiscope.analysis.report.drawable import MAX_DRAWN, fewer

    names = [f"o{i}" for i in range(10_000)]
    dataset = xr.Dataset(
        {"size": (("step", "operator"), np.ones((2, 10_000))), "of": (("step", "matrix"), np.ones((2, 20_000)))},
        coords={"operator": names, "matrix_name": ("matrix", ["x"] * 20_000)},
    )
    kept, note = fewer(dataset)
    assert kept.sizes == {"step": 2, "operator": MAX_DRAWN, "matrix": 20_000}
    assert note == "Drawn: 20 of 10000 operators; the tables hold all"
    of_matrices = xr.Dataset({"of": ("matrix", np.ones(10_000))}, coords={"operator": ("matrix", names)})
    assert fewer(of_matrices)[0].sizes == {"matrix": MAX_DRAWN}
    few = dataset.isel(operator=slice(MAX_DRAWN))
    assert fewer(few) == (few, "")


def test_too_many_operators_for_an_exact_solution_are_refused():
    from optiscope.diagnostics.schedules.allocation import problem

    with pytest.raises(ValueError, match="operators: expected at most 400 to give steps to, got 401"):
        problem([[1.0, 0.5]] * 401, (4, 5), [1] * 401, [1.0] * 401)


@pytest.mark.parametrize("name", ["zero", "endless", "marks"])
def test_a_scalars_name_that_no_folder_can_have_is_refused(tmp_path, record, name):
    from optiscope.hooks.recording.scalars import stored_name

    with pytest.raises(ValueError, match="cannot be a scalar's name"):
        stored_name(HOSTILE[name])


@pytest.mark.parametrize("name", ["parents", "absolute", "windows"])
def test_a_scalars_name_leads_out_of_no_folder(name):
    from optiscope.hooks.recording.scalars import stored_name

    assert not set("/\\") & set(stored_name(HOSTILE[name]))


def test_nothing_of_a_run_lies_outside_its_folder(hostile_run):
    assert [path.name for path in hostile_run.parent.iterdir()] == [hostile_run.name]
    assert {path.name for path in hostile_run.iterdir() if path.is_dir()} <= {"geometry", "update", "second_moment", "scalars", "lineages"}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_logged_is_one_line_of_text(caplog, name):
    import optiscope.hooks  # noqa: F401

    with caplog.at_level(logging.WARNING, "optiscope"):
        logging.getLogger("optiscope").warning("optiscope: %s is new", HOSTILE[name])
    (record,) = caplog.records
    assert record.getMessage().isprintable()
    assert len(record.getMessage()) < 50_000


@pytest.mark.parametrize("name", HOSTILE)
def test_texts_keep_what_can_be_read(name):
    text = HOSTILE[name]
    assert escaped(text).isprintable()
    assert escaped(escaped(text)) == escaped(text)
    assert strict(json_text({text: [text, float("nan")]})) == {text: [text, None]}
    assert json_text({text: text}).encode("utf-8")
    assert len(shortened(escaped(text))) <= 40 * 160
    assert storable(text) == (text if name != "surrogate" else "a\\ud800b")


@pytest.mark.parametrize("text", ["κ ε̃ √ × – 語", "สวัสดี ที่นี่", "क्षत्रिय", "a b", "é e\u0301", "Việt"])
def test_what_people_write_is_left_alone(text):
    assert escaped(text) == text
    assert shortened(text) == text


def test_a_new_file_has_the_permissions_of_new_files_and_an_old_one_its_own(tmp_path):
    (tmp_path / "plain").write_text("")
    write_whole(tmp_path / "new", "κ\n")
    assert (tmp_path / "new").read_bytes() == "κ\n".encode()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "new").chmod(0o640)
    write_whole(tmp_path / "new", b"2")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    (tmp_path / "link").symlink_to("new")
    write_whole(tmp_path / "link", "3")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "new").read_text() == "3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "new", "plain"]


def test_a_device_stays_one_and_an_error_names_the_file(tmp_path):
    write_whole(os.devnull, "gone")
    assert os.stat(os.devnull).st_size == 0
    assert not os.path.isfile(os.devnull)
    with pytest.raises(FileNotFoundError, match=r"none/page\.html"):
        write_whole(tmp_path / "none" / "page.html", "x")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path):
    """Ten processes that write over and over, each killed at some moment: what is there is one of the two, whole."""
    target = tmp_path / "page.html"
    pages = {letter * 3_000_000 for letter in "ab"}
    target.write_text("a" * 3_000_000)
    code = (
        "import sys; from optiscope.diagnostics.store.whole_file import write_whole\nprint('ready', flush=True)\n"
        "while True:\n for letter in 'ab': write_whole(sys.argv[1], letter * 3_000_000)"
    )
    for attempt in range(5):
        process = subprocess.Popen([sys.executable, "-c", code, target], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.01 + 0.007 * attempt)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert target.read_text() in pages
