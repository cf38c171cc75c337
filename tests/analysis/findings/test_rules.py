"""Every rule on a run that has exactly its fault; and no rule on a run that has none."""

import json

import numpy as np
import pytest

from optiscope.analysis import check, open_run
from optiscope.analysis.findings import SEVERITIES, Finding

Q, UP, ADAM = "layers.0.attn.q_proj.weight", "layers.1.mlp.up_proj.weight", "layers.0.attn.v_proj.weight"
SIGMA = np.geomspace(1, 1e-4, 12)  # hard enough that a sixth step of Jordan's coefficients would still help
JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
NO_SPECTRUM = {
    "sigma_quantile": np.full(64, np.nan), "condition_number": np.nan, "stable_rank": np.nan, "ns_residual": np.full(11, np.nan),
}  # fmt: skip
FROZEN = {"update_rms": 0.0, "update_norm": 0.0, "update_rms_per_lr": 0.0, "update_noise": np.inf, "update_to_weight": 0.0}


@pytest.fixture
def run_with(build_run):
    """A clean run of two Muon matrices and one of AdamW, with changes to each and to the run."""

    def run_with(changes=None, **settings):
        clean = {Q: {"sigma": SIGMA}, UP: {"sigma": SIGMA, "shape": (36, 12)}, ADAM: {"sigma": SIGMA, "optimizer": "AdamW"}}
        return build_run({name: {**matrix, **(changes or {}).get(name, {})} for name, matrix in clean.items()}, **settings)

    return run_with


def test_a_clean_run_has_no_findings(run_with):
    assert check(run_with()) == []
    # Nor with records missing, as when an optimizer steps less often.
    assert check(run_with({Q: {"sigma": [None, SIGMA, SIGMA]}, ADAM: {"sigma": [SIGMA, None, None]}})) == []


FAULTS = {
    # rule: (severity, changes, settings, what the sentence must hold, names)
    "rms_off_target": ("error", {UP: {"size": 16.0}}, {}, "Muon: the updates of 1 matrix are", (UP,)),
    # Not orthogonalised, an update has the RMS of X₀, 1/√12 of the target: one that is large enough to match AdamW's.
    "no_ns_steps": (
        "error",
        {Q: {"target": 0.8}, UP: {"target": 0.8}},
        {"schedules": ((),)},
        "2 matrices not orthogonalised: zero Newton–Schulz steps",
        (Q, UP),
    ),
    "not_finite": ("error", {ADAM: {"update": {"grad_rms": np.inf}}}, {}, "of 1 matrix, first at step 10", (ADAM,)),
    "dead": ("warning", {ADAM: {"update": FROZEN}}, {}, "1 matrix did not move in any record", (ADAM,)),
    "update_rounded": ("warning", {ADAM: {"update": {"update_noise": 0.25}}}, {}, "rounding noise is up to 25% of an update", (ADAM,)),
    "norm_near_eps": ("warning", {Q: {"geometry": {"fro_norm": 5e-6}}}, {}, "falls to 50 times the optimizer's eps (1e-07)", (Q,)),
    "zero_input": ("warning", {Q: {"geometry": {"fro_norm": 0.0, **NO_SPECTRUM}}}, {}, "of 1 matrix was all zeros", (Q,)),
    "dropped": ("warning", {}, {"attrs": {"dropped": 7}}, "at 7 steps is lost", ()),
    "recording_errors": ("warning", {}, {"attrs": {"errors": 3}}, "Measuring failed 3 times", ()),
    "single_row": ("info", {ADAM: {"sigma": (1.0,), "shape": (1, 12)}}, {}, "1 matrix with a single row or column", (ADAM,)),
    "condition_bounded": ("info", {Q: {"floor": True}}, {}, "In 33% of the snapshots κ is only known to be at least", (Q,)),
    "changed_outside": (
        "info",
        {UP: {"update": {"changed_outside": 1}}},
        {},
        "Weights of 1 matrix changed between the optimizer's steps, first before step 10",
        (UP,),
    ),
    "rms_not_matched": ("info", {Q: {"target": 0.05}, UP: {"target": 0.05}}, {}, "Muon: update RMS per learning rate is 0.2", ()),
}


@pytest.mark.parametrize("rule", FAULTS)
def test_a_fault_is_found_and_nothing_else(run_with, rule):
    severity, changes, settings, part, names = FAULTS[rule]
    (finding,) = check(run_with(changes, **settings))
    assert (finding.rule, finding.severity, finding.matrices) == (rule, severity, names)
    assert part in finding.sentence
    assert finding.sentence.endswith(".")
    assert finding.advice.endswith(".")
    json.dumps(finding.as_dict())


def test_the_factor_is_told(run_with, output):
    (finding,) = check(run_with({Q: {"size": 16.0}, UP: {"size": 16.0}}))
    a = np.sqrt(np.mean(output(SIGMA / np.linalg.norm(SIGMA), JORDAN) ** 2))
    assert f"the updates of 2 matrices are {16 * a:.3g} times their target size" in finding.sentence
    assert finding.matrices == (Q, UP)


def test_a_single_outlier_is_no_scaling(run_with, build_run):
    sizes = np.array([1.0, 1.0, 1.0, 9.0])
    run = build_run({Q: {"sigma": SIGMA}}, steps=range(4))
    for group, name in (("update", "update_rms_per_lr"), ("geometry", "alignment")):
        run[group][name].values[:] *= sizes[:, None]
    run["geometry"]["ns_residual_achieved"].values[:] = np.nan
    assert check(run) == []
    for group, name in (("update", "update_rms_per_lr"), ("geometry", "alignment")):
        run[group][name].values[1:] *= 9
    assert [finding.rule for finding in check(run)] == ["rms_off_target"]


def test_updates_lost_in_rounding_are_not_called_off_target(run_with):
    """With coarse weights the size read back is not the size that was meant: bfloat16 drops most small updates."""
    changes = {name: {"size": 0.1, "update": {"update_noise": 5.0}} for name in (Q, UP)}
    assert {finding.rule for finding in check(run_with(changes))} == {"update_rounded"}


def test_bfloat16_weights_really_are_read_so(tmp_path):
    import torch

    from optiscope.hooks import attach

    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 16, bias=False).to(torch.bfloat16)
    muon = torch.optim.Muon(layer.parameters(), lr=1e-4, weight_decay=0.0)
    with attach(muon, layer, tmp_path / "run.zarr", every=1, on_error="raise"):
        for _ in range(3):
            layer.zero_grad()
            layer(torch.randn(32, 16, dtype=torch.bfloat16)).square().sum().backward()
            muon.step()
    found = {finding.rule: finding.severity for finding in check(open_run(tmp_path / "run.zarr"))}
    assert found["update_rounded"] == "warning"
    assert "rms_off_target" not in found


def test_a_matrix_that_does_not_move_at_all_is_dead_not_off_target(run_with):
    assert [finding.rule for finding in check(run_with({Q: {"update": FROZEN}}))] == ["dead"]


def test_one_optimizer_alone_needs_no_common_scale(run_with, build_run):
    assert check(build_run({Q: {"sigma": SIGMA, "target": 0.05}})) == []


def test_findings_are_ordered_by_severity(run_with):
    changes = {Q: {"floor": True, "geometry": {"fro_norm": 5e-6}}, UP: {"size": 16.0}, ADAM: {"update": FROZEN}}
    severities = [finding.severity for finding in check(run_with(changes, attrs={"errors": 1}))]
    assert severities == ["error", *["warning"] * 3, "info"]
    assert SEVERITIES == ("info", "warning", "error")


@pytest.mark.parametrize(
    ("missing", "left"), [("geometry", {"dead", "recording_errors"}), ("update", {"condition_bounded", "recording_errors"})]
)
def test_a_run_with_one_group_is_checked_as_far_as_it_goes(run_with, missing, left):
    changes = {Q: {"floor": True}, ADAM: {"update": FROZEN}}
    run = run_with(changes, attrs={"errors": 1})
    empty = run.copy()
    del run[missing]
    assert {finding.rule for finding in check(run)} == left
    # The same where the group is there and was never filled.
    empty[missing] = empty[missing].to_dataset().isel(step=slice(0))
    assert {finding.rule for finding in check(empty)} == left


def test_a_run_without_records_cannot_be_checked(record, tmp_path):
    with pytest.raises(ValueError, match=r"^run: no records yet; record at least one step$"):
        check(open_run(record(tmp_path / "run.zarr", steps=0)))


def test_a_finding_is_plain_data():
    finding = Finding("dead", "warning", "A sentence.", "Advice.", ("a", "b"), {"share": np.float32(0.5), "unknown": np.nan})
    assert finding.as_dict() == {
        "rule": "dead",
        "severity": "warning",
        "sentence": "A sentence.",
        "advice": "Advice.",
        "matrices": ("a", "b"),
        "numbers": {"share": 0.5},
    }
