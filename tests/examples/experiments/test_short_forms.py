"""Every experiment's command in its short form, end to end; they share a folder, as the full ones do."""

import json
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

from optiscope.examples.experiments import alignment, budgets, geometry, persistence
from optiscope.examples.experiments.conditions import CONDITIONS

SEEDS, ARCHITECTURES = (0, 1), ("demo", "square-kv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("short")


@pytest.fixture
def short(folder, capsys):
    """Runs an experiment and checks what all of them leave; gives its result and what it said."""

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    def short(experiment):
        experiment.main(["--short", "-o", str(folder)])
        said = capsys.readouterr().out
        name = experiment.EXPERIMENT.name
        result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"), parse_constant=refuse)
        assert result["measured_with"]["versions"].keys() >= {"python", "torch", "optiscope"}
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        # What was kept is enough to tell and draw it again.
        again = folder / "again"
        experiment.main(["--from", str(folder / f"{name}.json"), "-o", str(again)])
        assert capsys.readouterr().out == said
        assert (again / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert not (again / f"{name}.json").exists()
        return result, said

    return short


def geometry_of(folder, model, condition, seed):
    with xr.open_datatree(folder / f"{model}-{condition}-lr0.02-seed{seed}.zarr", engine="zarr") as run:
        found = run["geometry"].to_dataset().load()
    return found.isel(matrix=np.flatnonzero((found["ns_schedule"] >= 0).all("step").values))


def test_geometry(short, folder):
    result, said = short(geometry)
    assert [(t["model"], t["seed"]) for t in result["trainings"]] == [(model, seed) for model in ARCHITECTURES for seed in SEEDS]
    for training in result["trainings"]:
        recorded = geometry_of(folder, training["model"], "uniform-5", training["seed"])
        kappa = np.log10(recorded["condition_number"].values)
        # Five steps from the first record on; the recorded curve holds the residual after each of them.
        residual = recorded["ns_residual"].values[..., 5]
        measured = ~recorded["condition_is_floor"].values
        assert training["pearson"]["log10_kappa"] == pytest.approx(np.corrcoef(kappa[measured], residual[measured])[0, 1], abs=2e-6)
        own = [10 ** kappa[:, (recorded["operator"] == o).values] for o in training["operators"]]
        np.testing.assert_allclose(training["kappa"], [np.median(np.median(k, axis=0)) for k in own], rtol=1e-5)
        # A centred product moment is the weighted mean of those within the operators.
        pairs = [(k[m], r[m]) for k, r, m in (_of(recorded, o, kappa, residual, measured) for o in training["operators"])]
        centred = np.concatenate([np.stack([k - k.mean(), r - r.mean()]) for k, r in pairs], axis=1)
        within = (centred[0] @ centred[1]) / np.sqrt((centred[0] @ centred[0]) * (centred[1] @ centred[1]))
        assert training["pearson"]["within"] == pytest.approx(within, abs=2e-6)
    assert "demo, 2 seeds" in said
    assert "nan" not in said


def _of(recorded, operator, *arrays):
    chosen = (recorded["operator"] == operator).values
    return [array[:, chosen] for array in arrays]


def test_persistence(short):
    result, said = short(persistence)
    assert len(result["trainings"]) == len(ARCHITECTURES) * len(SEEDS)
    for training in result["trainings"]:
        assert training["step"] == [4, 8, 12, 16, 20, 24]
        assert training["later"] == [False] * 4 + [True] * 2
        # The oracle is the best for each record, without the cap.
        assert all(c <= o + 1e-6 for c, o in zip(training["committed"], training["oracle"], strict=True))
        assert training["steps"]["uniform"] == [5] * 7
    assert "nan" not in said


def test_budgets(short, folder):
    result, said = short(budgets)
    expected = [("demo", name, seed) for name in CONDITIONS for seed in SEEDS]
    assert [(t["model"], t["condition"], t["seed"]) for t in result["trainings"]] == expected
    by = {(t["model"], t["condition"], t["seed"]): t for t in result["trainings"]}
    for seed in SEEDS:
        allowed = by["demo", "uniform-5", seed]["flops"]
        for name in budgets.COMMITTED:
            one = by["demo", name, seed]
            assert one["flops"] <= allowed
            _check_residuals(one, geometry_of(folder, "demo", name, seed))
        four, six = (np.array(by["demo", name, seed]["residuals"]["predicted"]) for name in ("uniform-4", "uniform-6"))
        assert (six < four).all()
        uniform = by["demo", "uniform-5", seed]["residuals"]
        assert uniform["predicted"] == uniform["baseline"]
        # float32 weights: seen 3e-4.
        assert max(by["demo", "exact", seed]["residuals"]["achieved"]) < 2e-3
    assert not budgets.gains(result, "demo", "uniform-5").any()
    final = {name: [by["demo", name, seed]["validation"][-1][1] for seed in SEEDS] for name in ("amo", "uniform-5")}
    difference = np.subtract(final["amo"], final["uniform-5"])
    assert f"| {difference.mean():+.4f} [" in next(line for line in said.splitlines() if line.startswith("| amo |"))
    assert "nan" not in said


def _check_residuals(one, recorded):
    """Predicted and achieved means from the recorded curves of five steps in the window, and of each matrix's own steps behind it."""
    step = recorded["step"].values
    steps_of = np.array([one["committed"][o] for o in recorded["operator"].values])
    coefficients = [len(entry["coefficients"]) for entry in recorded.attrs["ns_schedules"]]
    in_force = np.array(coefficients)[recorded["ns_schedule"].values]
    assert (in_force[step <= 16] == 5).all()
    assert (in_force[step > 16] == steps_of).all()
    curve = np.take_along_axis(recorded["ns_residual"].values, in_force[..., None], axis=-1)[..., 0]
    assert one["residuals"]["step"] == step.tolist()
    # Stored spectra are rounded to 12 bits, 1.2e-4 of each at most, and the curves were computed before; seen: 6e-4.
    np.testing.assert_allclose(one["residuals"]["predicted"], curve.mean(axis=1), rtol=2e-3)
    np.testing.assert_allclose(one["residuals"]["achieved"], recorded["ns_residual_achieved"].values.mean(axis=1), rtol=1e-5)


def test_alignment(short):
    result, said = short(alignment)
    by = {(t["optimizer"], t["seed"]): t for t in result["trainings"]}
    assert list(by) == [(name, seed) for name in alignment.OPTIMIZERS for seed in SEEDS]
    for seed in SEEDS:
        for version in ("v1", "v2"):
            assert by[f"adamuon-{version}", seed]["sizes"]["furthest"] < 1e-6  # whatever the iteration left undone
        assert by["muon", seed]["sizes"]["furthest"] > 0.01
        assert by["adamw", seed]["saved"] == {"training": 0.0, "validation": 0.0}
    for training in by.values():
        for kind in ("training", "validation"):
            expected = _saved(training, by["adamw", training["seed"]], kind)
            assert training["saved"][kind] == (None if expected is None else pytest.approx(expected, abs=1e-4))
    assert "nan" not in said


def _saved(training, reference, kind):
    """1 − (step at which the other's last loss is reached, on straight lines between known losses)/(the other's)."""

    def curve(one):
        return list(enumerate(one["smoothed"], start=1)) if kind == "training" else [tuple(pair) for pair in one["validation"]]

    def reached(points, target):
        before = points[0]
        for step, loss in points:
            if loss <= target:
                return step if step == before[0] else before[0] + (before[1] - target) / (before[1] - loss) * (step - before[0])
            before = step, loss
        return None

    target = curve(reference)[-1][1]
    step = reached(curve(training), target)
    return None if step is None else 1 - step / reached(curve(reference), target)


def test_the_command_is_found_where_the_package_is_installed(tmp_path):
    command = [sys.executable, "-m", "optiscope.examples.experiments.budgets", "--help"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert {"--short", "--output", "--size", "--device", "--text", "--from"} <= set(said.replace(",", " ").split())
