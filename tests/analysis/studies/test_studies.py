"""One contract for all studies: over one table of runs, each gives a figure, tables and a sentence, or says why not."""

import json
import math

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from optiscope import analysis
from optiscope.analysis import figures
from optiscope.analysis.report.folder import analyse_study, finish_report
from optiscope.diagnostics.operators import OPERATORS

# Before any figure of this module was made.
SETTINGS = dict(mpl.rcParams)

NAMES = [f"layers.{layer}.{part}.weight" for layer in range(3) for part in ("attn.q_proj", "mlp.up_proj")]
SIGMA = [np.linspace(1, low, 8) for low in (0.9, 0.5, 0.2, 0.1, 0.05, 0.01)]
NOT_FINITE = {
    "geometry": {"sigma_quantile": np.full(64, np.nan), "condition_number": np.nan, "fro_norm": np.nan, "ns_residual": np.full(11, np.nan)},
    "update": dict.fromkeys(("update_rms", "update_rms_per_lr", "grad_rms", "update_noise"), np.nan),
}
NS_STUDIES = {"kappa_vs_residual", "residual_curves", "allocation_regret", "ns_band"}
# Of what was logged, whatever became of the matrices.
LOSS_STUDIES = {"efficiency_table", "spikes"}
# Need more than the spectra and update sizes that plain built runs have.
MORE = {*analysis.STUDIES} - {
    "kappa_vs_residual", "kappa_by_operator", "kappa_by_layer", "shallow_vs_deep", "residual_curves", "rms_alignment", "trust_ratio",
    "allocation_regret", "ns_band", "efficiency_table", "spikes",
}  # fmt: skip

# Changes to six plain matrices, and the studies that must refuse the run with a reason.
RUNS = {
    "never recorded": (lambda m: {**m, "layers.0.attn.o_proj.weight": {"sigma": [None] * 3, "shape": (8, 8)}}, set()),
    "gaps": (lambda m: {name: {"sigma": [None, *[x["sigma"]] * 2] if i % 2 else x["sigma"]} for i, (name, x) in enumerate(m.items())}, set()),
    "last record empty": (lambda m: {name: {"sigma": [x["sigma"], x["sigma"], None]} for name, x in m.items()}, set()),
    "diverged later": (lambda m: {**m, NAMES[0]: {**m[NAMES[0]], **NOT_FINITE}}, set()),
    "diverged": (lambda m: {name: {**x, **NOT_FINITE} for name, x in m.items()}, {*analysis.STUDIES} - LOSS_STUDIES - {"rms_alignment", "trust_ratio"}),
    "bounds only": (lambda m: {name: {**x, "floor": True} for name, x in m.items()}, set()),
    "all the same": (lambda m: {name: {"sigma": SIGMA[0]} for name in m}, set()),
    "AdamW only": (lambda m: {name: {**x, "optimizer": "AdamW"} for name, x in m.items()}, NS_STUDIES),
    "one matrix": (lambda m: {NAMES[0]: m[NAMES[0]]}, {"shallow_vs_deep", "allocation_regret"}),
    "single rows": (lambda m: {name: {"sigma": (1.0,), "shape": (1, 8)} for name in m}, set()),
    "an operator of the user's": (lambda m: {**m, "layers.0.tower.weight": {"sigma": SIGMA[1]}}, set()),
}  # fmt: skip
# Matplotlib tells only when it draws that an axis has no finite value. Drawing takes longest, so: the sparsest runs.
DRAWN = {"last record empty", "diverged", "one matrix"}


@pytest.fixture(scope="module", params=RUNS)
def case(request, build_run):
    change, refusing = RUNS[request.param]
    matrices = change({name: {"sigma": sigma} for name, sigma in zip(NAMES, SIGMA, strict=True)})
    run = build_run(matrices, scalars={"loss": [3.0, 2.0, 1.0]})
    return run, refusing | MORE, request.param in DRAWN


@pytest.mark.parametrize("name", analysis.STUDIES)
def test_a_study_gives_a_sentence_and_a_figure_or_a_reason(case, name):
    run, refusing, drawn = case
    check_study(run, name, name in refusing, drawn)


# Changes to the same six matrices, and the studies that must refuse the run with a reason although it has every quantity of every group.
COMPLETE_RUNS = {
    "one record": (lambda m: m, {"steps": (10,)}, set()),
    "one matrix": (lambda m: {NAMES[0]: m[NAMES[0]]}, {}, {"shallow_vs_deep", "stacking", "allocation_regret"}),
    "last record empty": (lambda m: {name: {"sigma": [x["sigma"], x["sigma"], None]} for name, x in m.items()}, {}, set()),
    "AdamW only": (lambda m: {name: {**x, "optimizer": "AdamW"} for name, x in m.items()}, {}, {*NS_STUDIES, "precision_split"}),
}


@pytest.fixture(scope="module", params=COMPLETE_RUNS)
def complete_case(request, complete_run):
    change, how, refusing = COMPLETE_RUNS[request.param]
    return complete_run(change({name: {"sigma": sigma} for name, sigma in zip(NAMES, SIGMA, strict=True)}), **how), refusing


@pytest.mark.parametrize("name", analysis.STUDIES)
def test_a_study_of_a_complete_run_gives_a_sentence_and_a_figure_or_a_reason(complete_case, name):
    run, refusing = complete_case
    check_study(run, name, name in refusing, drawn=True)


def check_study(run, name, refuses, drawn):
    study = getattr(analysis, name)
    if refuses:
        with pytest.raises(ValueError, match=r"^run: "):
            study.study(run)
        return
    dataset = study.study(run)
    figure = study.plot(dataset)
    if drawn:
        figure.draw_without_rendering()
    text = study.summary(dataset)
    assert text.endswith(".")
    assert "\n" not in text
    assert "nan" not in text.lower()
    assert "inf" not in text.lower()


# study: (log x, log y) per panel.
SCALES = {
    "kappa_vs_residual": [(True, False)],
    "kappa_by_operator": [(False, True), (False, False), (True, False)],
    "kappa_by_layer": [(False, True)],
    "shallow_vs_deep": [(False, True), (False, False)],
    "residual_curves": [(False, False)] * 3,
    "rms_alignment": [(False, False), (False, True), (True, False)],
    "precision_split": [(False, True), (False, False)],
    "gradient_spectrum": [(False, True), (False, False), (False, False)],
    "block_geometry": [(True, False)] * 3,
    "stacking": [(True, False), (False, False)],
    "update_dispersion": [(False, False)] * 2,
    "rotation": [(False, False)] * 2,
    "gradient_correction": [(False, False)] * 2,
    "sharpness": [(False, False), (False, True)],
    "hdiag_quality": [(True, True), (False, False)],
    "hessian_blocks": [(False, False)] * 2,
    "precond_effect": [(True, True)] * 2,
    "weight_decay": [(False, False), (False, True), (False, True)],
    "trust_ratio": [(False, True), (False, False), (False, True)],
    "second_moment": [(False, True), (False, False), (False, True)],
    "v_rank1": [(False, False)] * 4,
    "v_blocks": [(False, False), (True, False), (False, False)],
    "lr_statistic_ablation": [(False, False)],
    "soap_basis": [(False, False)] * 2 + [(False, True)] * 2,
    "sophia_clip": [(False, False)] * 2,
    "allocation_regret": [(False, False)] * 3,
    "ns_band": [(True, True)],
    "efficiency_table": [(False, False)],
    "spikes": [(False, True)],
}
# The operators along the left panel of rms_alignment name themselves, and panels that share an axis label it once.
UNLABELLED = {
    ("rms_alignment", 0, "x"), ("rms_alignment", 2, "y"), ("residual_curves", 1, "y"), ("residual_curves", 2, "y"), ("block_geometry", 1, "y"), ("block_geometry", 2, "y"), ("allocation_regret", 2, "x"), ("allocation_regret", 2, "y"), ("v_blocks", 1, "y"),
}  # fmt: skip


@pytest.mark.parametrize("name", analysis.STUDIES)
def test_a_figure_is_labelled_and_touches_nothing_global(model_run_complete, name):
    study = getattr(analysis, name)
    dataset = study.study(model_run_complete)
    figure = study.plot(dataset)
    figure.draw_without_rendering()
    assert dict(mpl.rcParams) == SETTINGS
    assert plt.get_fignums() == []
    assert type(figure) is Figure
    panels = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    assert [(ax.get_xscale() == "log", ax.get_yscale() == "log") for ax in panels] == SCALES[name]
    for i, ax in enumerate(panels):
        assert ax.get_title()
        assert ax.get_xlabel() or (name, i, "x") in UNLABELLED
        assert ax.get_ylabel() or (name, i, "y") in UNLABELLED


def test_a_study_changes_neither_the_run_nor_its_own_table(model_run_complete):
    before = model_run_complete.copy(deep=True)
    for name in analysis.STUDIES:
        study = getattr(analysis, name)
        dataset = study.study(model_run_complete)
        kept = dataset.copy(deep=True)
        study.plot(dataset)
        study.summary(dataset)
        assert dataset.identical(kept)
    assert model_run_complete.identical(before)


def test_every_operator_has_a_colour_of_its_own():
    palette = figures.operator_palette([*OPERATORS, "tower", "mixer"])
    assert len(set(palette.values())) == len(OPERATORS) + 2
    # The same in every figure, whatever else is in it.
    assert all(palette[o] == figures.operator_palette([o])[o] for o in OPERATORS)


def test_the_report_holds_every_studys_files(model_run_complete, tmp_path):
    said = {name: analyse_study(model_run_complete, name, tmp_path / "out", required=False) for name in analysis.STUDIES}
    result = finish_report(model_run_complete, tmp_path / "out", said)
    listed = {file for study in result["studies"].values() for file in study["files"]}
    assert {path.name for path in (tmp_path / "out").iterdir()} == listed | {"summary.json"}
    written = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(result))  # which has no tuples
    for name in analysis.STUDIES:
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_tables_hold_the_studies_numbers(model_run_complete, tmp_path):
    files = analyse_study(model_run_complete, "kappa_by_operator", tmp_path, required=True)["files"]
    assert files == ["kappa_by_operator.png", "kappa_by_operator.step-operator.csv", "kappa_by_operator.operator.csv"]
    table = pd.read_csv(tmp_path / "kappa_by_operator.step-operator.csv", index_col=["step", "operator"])
    dataset = analysis.kappa_by_operator.study(model_run_complete)
    assert list(table.columns) == ["lower", "median", "upper", "excess"]
    for (step, operator), row in table.iterrows():
        for variable, value in row.items():
            assert value == pytest.approx(float(dataset[variable].sel(step=step, operator=operator)), rel=1e-7)


def test_a_study_that_the_run_does_not_allow_is_skipped_with_the_reason(build_run, tmp_path):
    run = build_run({NAMES[0]: {"sigma": SIGMA[0], "optimizer": "AdamW"}})
    skipped = analyse_study(run, "residual_curves", tmp_path, required=False)
    assert skipped["skipped"]
    assert skipped["files"] == []
    assert skipped["summary"].startswith("skipped: run: no optimizer in it orthogonalises")
    with pytest.raises(ValueError, match="no optimizer in it orthogonalises"):
        analyse_study(run, "residual_curves", tmp_path, required=True)
    # Nothing is left behind, and a report of nothing but skipped studies is an error.
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"^run: no optimizer in it orthogonalises"):
        finish_report(run, tmp_path, {"residual_curves": skipped})


def test_numbers_of_the_report_are_finite(case, tmp_path):
    run, _, _ = case
    said = {name: {"summary": "", "files": [], "skipped": False} for name in analysis.STUDIES}
    document = json.dumps(finish_report(run, tmp_path, said))
    assert not any(isinstance(value, float) and not math.isfinite(value) for value in numbers(json.loads(document)))


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [n for item in value for n in numbers(item)] if isinstance(value, list) else [value]
