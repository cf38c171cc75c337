"""Every command on a good run: what it prints, what it writes, how it exits."""

import shutil
from importlib.metadata import entry_points
from pathlib import Path

import pandas as pd
import pytest
import torch

from optiscope.analysis import STUDIES, derive_schedule, open_run
from optiscope.cli import app
from optiscope.cli.console import parse_window, sibling
from optiscope.cli.schedule import print_schedule
from optiscope.diagnostics import OperatorSchedule, Schedule, matched_coefficients
from optiscope.hooks import attach


def test_diag_is_the_command():
    assert entry_points(group="console_scripts")["diag"].load() is app


def test_info_tells_what_is_in_a_run(diag, recorded):
    result = diag("info", recorded)
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{recorded}: begun 20")
    assert "Muon: torch.optim.Muon, read by table; geometry describes the exact NS input: " in result.stdout
    assert "geometry: 12 records, steps 1 to 12" in lines
    # operator, matrices, shapes, layers
    assert ["attn_q", "2", "6×6", "0–1"] in [line.split() for line in lines]
    assert ["mlp_up", "2", "6×9", "0–1"] in [line.split() for line in lines]
    assert ["head", "1", "6×6"] in [line.split() for line in lines]
    assert any(line.startswith("last loss: ") for line in lines)
    assert any(line.startswith("recording: took ") for line in lines)


def test_info_of_a_run_without_records(diag, record, tmp_path):
    result = diag("info", record(tmp_path / "run.zarr", steps=0))
    assert result.exit_code == 0
    assert "geometry: 0 records" in result.stdout.splitlines()


def test_info_as_json(diag, recorded, strict_json):
    result = diag("info", recorded, "--json")
    found = strict_json(result.stdout)
    assert result.stderr == ""
    assert found["groups"]["update"] | {"variables": []} == {"records": 12, "first_step": 1, "last_step": 12, "variables": []}
    assert "update_rms" in found["groups"]["update"]["variables"]
    assert found["operators"][0] == {"operator": "attn_q", "matrices": 2, "shapes": "6×6", "layers": "0–1"}
    assert found["versions"].keys() >= {"torch", "optiscope"}
    assert 0 < found["overhead"] < 1


@pytest.fixture(scope="module")
def analysed(diag, recorded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis") / "out"
    return folder, diag("analyze", recorded, "-o", folder)


def test_analyze_says_a_sentence_per_study(analysed):
    folder, result = analysed
    assert (result.exit_code, result.stderr) == (0, "")
    said = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert list(said)[: len(STUDIES)] == list(STUDIES)
    assert said["figures and tables"] == str(folder)
    assert "nan" not in result.stdout


def test_analyze_writes_figures_tables_and_a_summary(analysed, strict_json):
    folder, _ = analysed
    summary = strict_json((folder / "summary.json").read_text(encoding="utf-8"))
    answered = {name: said["files"] for name, said in summary["studies"].items() if not said["skipped"]}
    assert {
        "kappa_vs_residual",
        "kappa_by_operator",
        "kappa_by_layer",
        "shallow_vs_deep",
        "residual_curves",
        "rms_alignment",
    } <= answered.keys()
    assert list(summary["studies"]) == list(STUDIES)
    for name, files in answered.items():
        assert files[0] == f"{name}.png"
        assert (folder / files[0]).read_bytes().startswith(b"\x89PNG\r\n")
        assert len(files) > 1
        for table in files[1:]:
            assert len(pd.read_csv(folder / table))


def test_analyze_as_json_is_the_summary(diag, recorded, tmp_path, strict_json):
    result = diag("analyze", recorded, "--study", "kappa_by_layer", "--study", "rms_alignment", "-o", tmp_path / "new" / "out", "--json")
    assert result.stderr == ""
    found = strict_json(result.stdout)
    assert found == strict_json((tmp_path / "new" / "out" / "summary.json").read_text(encoding="utf-8"))
    assert list(found["studies"]) == ["kappa_by_layer", "rms_alignment"]
    assert len(list((tmp_path / "new" / "out").glob("*.png"))) == 2


def test_analyze_writes_beside_the_run(diag, recorded, tmp_path, monkeypatch):
    shutil.copytree(recorded, tmp_path / "my.zarr")
    assert diag("analyze", tmp_path / "my.zarr", "--study", "kappa_by_layer").exit_code == 0
    assert (tmp_path / "my-analysis" / "kappa_by_layer.png").exists()
    # Also from inside the run, where its path has no name.
    shutil.rmtree(tmp_path / "my-analysis")
    monkeypatch.chdir(tmp_path / "my.zarr")
    assert diag("analyze", ".", "--study", "kappa_by_layer").exit_code == 0
    assert (tmp_path / "my-analysis" / "kappa_by_layer.png").exists()


def test_analyze_skips_what_a_run_does_not_allow(diag, record, tmp_path):
    record(tmp_path / "adam.zarr", muon=False, steps=3)
    result = diag("analyze", tmp_path / "adam.zarr")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "residual_curves: skipped: run: no optimizer in it orthogonalises" in result.stdout
    assert (tmp_path / "adam-analysis" / "kappa_by_operator.png").exists()
    assert not (tmp_path / "adam-analysis" / "residual_curves.png").exists()


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ([], {}),
        (["--budget", "6", "--rule", "minimax"], {"budget": 6, "rule": "minimax"}),
        (["--family", "jordan", "--window", "3:6"], {"family": "jordan", "window": slice(3, 6)}),
        (["--recoverable", "--split", "never", "--no-keep-uniform"], {"recoverable": True, "split": "never", "keep_uniform": False}),
        (["--rule", "kappa"], {"rule": "kappa"}),
    ],
)
def test_schedule_writes_what_derive_schedule_gives(diag, recorded, tmp_path, options, arguments):
    result = diag("schedule", recorded, "-o", tmp_path / "s.json", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    found, expected = Schedule.load(tmp_path / "s.json"), derive_schedule(open_run(recorded), **arguments)
    assert (found.operators, found.budget, found.objective) == (expected.operators, expected.budget, expected.objective)
    # As a table: the steps and residuals of each operator.
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines()[1 : 1 + len(found.operators)]}
    for operator, entry in found.operators.items():
        residuals = f"{entry.baseline_residual:.3f}", f"{entry.predicted_residual:.3f}"
        assert rows[operator][1:5] == [str(len(entry.matrices)), str(entry.steps), *residuals]
    first, last = found.provenance["window"]
    records = found.provenance["snapshots"]
    assert f"observed: {records} record{'s' * (records > 1)}, steps {first} to {last}" in result.stdout


def verdicts(diag, run, tmp_path, *options):
    """The schedule, and the printed sentences by topic."""
    result = diag("schedule", run, "-o", tmp_path / "s.json", *options)
    assert result.exit_code == 0
    lines = (line.partition(": ") for line in result.stdout.splitlines() if ": " in line)
    return Schedule.load(tmp_path / "s.json"), {topic: text for topic, _, text in lines}


def test_schedule_says_that_two_layers_are_too_few(diag, recorded, tmp_path):
    _, said = verdicts(diag, recorded, tmp_path, "--budget", "4")
    assert said["gain"].endswith("(no interval: 2 layers are too few to draw from)")
    assert said["depth"] == "not tested: no operator has 4 layers to halve"


def test_a_rule_that_chooses_equal_steps_says_so(diag, recorded, tmp_path):
    _, said = verdicts(diag, recorded, tmp_path, "--rule", "uniform", "--window", "12:12")
    assert said["gain"] == "none to be had by this rule: it chooses 5 steps for all"
    assert said["observed"] == "1 record, steps 12 to 12"


def test_schedule_says_how_sure_it_is(diag, record, tmp_path):
    names = [f"layers.{layer}.{part}" for layer in range(4) for part in ("attn.q_proj", "mlp.up_proj")]
    run = record(tmp_path / "run.zarr", names=names, steps=6)
    found, said = verdicts(diag, run, tmp_path, "--rule", "mean-uncapped", "--split", "never", "--budget", "6")
    choice = found.objective["choice"]
    low, high = choice["relative_gain_interval"]
    assert said["gain"] == (
        f"{choice['relative_gain']:.1%} of the mean residual under 6 steps for all (95 % over 4 layers: {low:.1%} to {high:.1%})"
    )
    # As an interval that holds zero decides: in this run, or in none.
    assert ("kept uniform" in said) == found.objective["kept_uniform"]
    variances = found.provenance["depth"]["variances"]
    most = max(variances, key=lambda operator: variances[operator]["between_halves"])
    assert said["depth"].startswith(f"log κ varies by {variances[most]['between_halves']:.3f} between the halves of {most}'s layers")
    assert said["depth"].endswith("no operator is cut in two")
    cut, told = verdicts(diag, run, tmp_path, "--rule", "mean-uncapped")
    apart = [o for o, tested in variances.items() if tested["between_halves"] > tested["between_operators"]]
    assert told["depth"].endswith(f"cut in two: {', '.join(apart)}" if apart else "no operator is cut in two")
    assert {o for o in cut.operators if ":" in o} == {f"{o}:{layers}" for o in apart for layers in ("0-1", "2-3")}


def test_schedule_says_what_it_kept_uniform_and_what_is_noise(capsys, tmp_path):
    entry = OperatorSchedule(matched_coefficients(5), ("a",), 0.5, 0.5, 10)
    choice = {
        "steps": {"attn_q": 7, "mlp_up": 4}, "gain": 0.01, "gain_interval": [-0.01, 0.02], "relative_gain": 0.02,
        "relative_gain_interval": [-0.02, 0.04], "recoverable_share": 0.25,
        "mean_residuals": {"all": {"uniform": 0.5, "choice": 0.49}, "recoverable": {"uniform": 0.4, "choice": 0.38}},
    }  # fmt: skip
    numbers = ("in_force_mean_residual", "mean_residual", "max_residual", "baseline_mean_residual", "baseline_max_residual")
    found = Schedule(
        {"attn_q": entry, "mlp_up": entry},
        {"mean_steps": 5, "limit": 20, "cost": 20},
        {**dict.fromkeys(numbers, 0.5), "rule": "mean", "recoverable": False, "kept_uniform": True, "choice": choice},
        {
            "window": [20, 90], "snapshots": 8, "layers": 6, "family": "matched", "below_bfloat16_floor": {"attn_q": 0.3, "mlp_up": 0.0},
            "depth": {"split": "auto", "variances": {"attn_q": {"between_halves": 0.5, "between_operators": 0.25}}},
        },
    )  # fmt: skip
    print_schedule(found, tmp_path / "s.json")
    said = capsys.readouterr().out
    assert "gain: 2.0% of the mean residual under 5 steps for all (95 % over 6 layers: -2.0% to 4.0%)" in said
    assert "kept uniform: that may be nothing, so all keep 5 steps; with --no-keep-uniform it would be attn_q 7, mlp_up 4" in said
    assert (
        "above bf16 noise: 25% of the mean residual's fall is of singular values that bfloat16 carries; over those alone it goes from"
        in said
    )


def test_schedule_as_json_is_the_file(diag, recorded, tmp_path, strict_json):
    result = diag("schedule", recorded, "-o", tmp_path / "s.json", "--json")
    assert result.stderr == ""
    assert result.stdout == (tmp_path / "s.json").read_text(encoding="utf-8")
    assert strict_json(result.stdout)["format"] == "optiscope-schedule"


def test_schedule_is_written_here_by_default(diag, recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert diag("schedule", recorded).exit_code == 0
    assert Schedule.load("schedule.json").operators


@pytest.mark.parametrize(
    ("text", "expected"), [("20:100", slice(20, 100)), (":100", slice(None, 100)), ("20:", slice(20, None)), (None, None)]
)
def test_windows_are_ranges_of_steps(text, expected):
    assert parse_window(text) == expected


@pytest.fixture(scope="module")
def runs(record, tmp_path_factory):
    """Runs whose worst finding is: nothing but information, a warning, an error."""
    folder = tmp_path_factory.mktemp("runs")
    record(folder / "info.zarr")
    record(folder / "warning.zarr", eps=2e-3)
    record(folder / "error.zarr", ns_steps=0)
    return folder


@pytest.mark.parametrize(
    ("worst", "fail_on", "code"),
    [
        ("info", None, 0), ("info", "info", 1), ("info", "error", 0),
        ("warning", None, 1), ("warning", "warning", 1), ("warning", "error", 0),
        ("error", None, 1), ("error", "error", 1), ("error", "info", 1),
    ],
)  # fmt: skip
def test_check_exits_by_the_worst_finding(diag, runs, strict_json, worst, fail_on, code):
    options = ["--fail-on", fail_on] if fail_on else []
    result = diag("check", runs / f"{worst}.zarr", *options)
    assert (result.exit_code, result.stderr) == (code, "")
    assert result.stdout.startswith(f"{worst} ")
    as_json = diag("check", runs / f"{worst}.zarr", *options, "--json")
    assert (as_json.exit_code, as_json.stderr) == (code, "")
    found = strict_json(as_json.stdout)
    assert found["findings"][0]["severity"] == worst
    assert bool(found["failing"]) == bool(code)
    assert len(result.stdout.splitlines()) == len(found["findings"])


def test_check_names_the_first_matrices(diag, runs):
    line = next(line for line in diag("check", runs / "error.zarr").stdout.splitlines() if line.startswith("error no_ns_steps: "))
    assert "(layers.0.attn.q_proj.weight, layers.0.mlp.up_proj.weight, layers.1.attn.q_proj.weight and 1 more)" in line


def test_check_of_a_clean_run_says_none(diag, tmp_path, strict_json):
    # Gradient descent on a square matrix of full rank: no second moment and no iteration that there could be a word about.
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 6, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9)
    with attach(optimizer, layer, tmp_path / "clean.zarr", every=1, on_error="raise"):
        for _ in range(12):
            optimizer.zero_grad()
            layer(torch.randn(32, 6)).square().mean().backward()
            optimizer.step()
    result = diag("check", tmp_path / "clean.zarr", "--fail-on", "info")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "findings: none\n", "")
    assert strict_json(diag("check", tmp_path / "clean.zarr", "--json").stdout) == {"findings": [], "failing": 0, "activity": None}


def test_siblings_stand_beside_the_run(tmp_path, monkeypatch):
    assert sibling(Path("a/b.zarr"), "-analysis") == Path("a/b-analysis")
    assert sibling(Path("b"), "-schedule.json") == Path("b-schedule.json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    assert sibling(Path(), "-x") == sibling(Path("inner/.."), "-x") == Path(f"{tmp_path}-x")


def test_what_if_answers_first_and_writes_no_schedule(diag, recorded, tmp_path, monkeypatch, strict_json):
    monkeypatch.chdir(tmp_path)
    families = ["--family", "you", "--family", "matched", "--family", "cubic"]
    result = diag("what-if", recorded, *families, "--by-operator", "-o", "table.csv")
    assert (result.exit_code, result.stderr) == (0, "")
    first, second, *_ = result.stdout.splitlines()
    assert first.startswith(
        "what if: 5 steps of 'you' would leave the smallest mean residual for the FLOPs of what is in force (5 steps of jordan), "
    )
    assert second.startswith("schedule: diag schedule takes 'matched', which is designed anew for each number of steps (")
    assert "mean residual in bfloat16" in result.stdout
    assert "observed: " in result.stdout
    assert sum(line.startswith("by operator: residual in bfloat16 under ") for line in result.stdout.splitlines()) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    table = pd.read_csv(tmp_path / "table.csv")
    assert table.columns[:5].tolist() == ["family", "k", "operator", "residual_float64", "residual_bfloat16"]
    assert len(table) == 3 * 6 * 3
    told = strict_json(diag("what-if", recorded, *families, "--json").stdout)
    assert told["answer"]["family"] == "you"
    at = table[(table["family"] == "you") & (table["k"] == 5) & (table["operator"] == "all")]
    assert told["answer"]["residual_bfloat16"] == pytest.approx(at["residual_bfloat16"].item(), rel=1e-4)
    assert f"{told['answer']['residual_bfloat16']:.3f} in bfloat16" in first
    assert told["summary"] in first


def test_what_if_of_all_families(diag, recorded, strict_json):
    told = strict_json(diag("what-if", recorded, "--json").stdout)
    assert {row["operator"] for row in told["rows"]} == {"all", "attn_q", "mlp_up"}
    assert len(told["in_force"]) == 2
    assert len({row["family"] for row in told["rows"]}) > 8
    # Of each operator three families are told: those that leave least.
    shown = diag("what-if", recorded, "--by-operator").stdout
    titles = [line.rpartition(" ")[2] for line in shown.splitlines() if line.startswith("by operator: ")]
    means = {row["family"]: row["residual_bfloat16"] for row in told["rows"] if row["operator"] == "all" and row["k"] == 5}
    safe = [family for family in sorted(means, key=means.get) if f"{family} (!)" not in shown]
    assert titles == safe[:3]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--budget", "7"], "for the FLOPs of 7 quintic steps for all, "),
        (["--rule", "minimax"], "would leave the smallest residual of the worst operator for "),
        (["--recoverable"], "would leave the smallest mean residual above bfloat16's noise for "),
    ],
)
def test_what_if_heeds_its_options(diag, recorded, options, part):
    plain, chosen = (
        diag("what-if", recorded, "--family", "matched", "--family", "you", *more).stdout.splitlines() for more in ([], options)
    )
    assert part in chosen[0]
    assert part not in plain[0]
    # Beside the answer only what is asked for changes.
    assert ("mean residual above bfloat16's noise" in "".join(chosen[1:])) == ("--recoverable" in options)


def test_a_schedule_takes_one_family(diag, recorded, tmp_path):
    result = diag("schedule", recorded, "--family", "you", "-o", tmp_path / "s.json")
    assert result.exit_code == 0
    assert Schedule.load(tmp_path / "s.json").provenance["family"] == "you"
