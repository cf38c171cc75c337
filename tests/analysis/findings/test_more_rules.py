"""Rules on coefficients, causes, history, second moments, blocks and schedules: each on a built run with its fault, and silent on others."""

import json

import numpy as np
import pytest
import xarray as xr

from optiscope.analysis import check
from optiscope.analysis.findings.size_causes import CAUSES, explain, growth

JORDAN = (3.4445, -4.7750, 2.0315)
YOU = (
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
)  # fmt: skip
AOL = ((4.0098, -7.0585, 2.4635), (3.4585, -5.5479, 2.5959), (2.7573, -3.2939, 1.4254), (2.7215, -3.0494, 1.3169))
HARD = np.geomspace(1, 1e-4, 12)
EVEN = np.linspace(1, 0.5, 12)
DOMINANT = np.r_[1.0, np.full(11, 0.05)]  # x₁ = 0.986
Q, UP, V = "layers.0.attn.q_proj.weight", "layers.1.mlp.up_proj.weight", "layers.0.attn.v_proj.weight"


def failing(run):
    return {f.rule: f for f in check(run) if f.severity != "info"}


def informing(run):
    found = check(run)
    json.dumps([f.as_dict() for f in found], allow_nan=False)
    return {f.rule: f for f in found}


COEFFICIENTS = {
    "ns_cycled": ((*YOU, YOU[0]), HARD, "begins anew at step 6"),
    "ns_escape": (((3.4916, -4.8224, 2.1095),) * 5, HARD, "reach 1.2246 after step 1, and beyond 1.2236"),
    "ns_sign": (
        AOL,
        DOMINANT,
        "values above 0.8837 of ‖M‖_F negative: the update goes against its leading direction in 100% of the records",
    ),
    "ns_band": (((1.5, -0.5, 0.0),) * 5, HARD, "end in [0.0758, 1]"),
}


@pytest.mark.parametrize("rule", COEFFICIENTS)
def test_coefficients(build_run, rule):
    coefficients, sigma, part = COEFFICIENTS[rule]
    with np.errstate(over="ignore", invalid="ignore"):  # what ten steps would make of these
        run = build_run({Q: {"sigma": sigma}}, schedules=(coefficients,))
    found = failing(run)
    assert set(found) - {"not_aligned"} == {rule}  # such an output may well point elsewhere, too
    assert part in found[rule].sentence
    assert found[rule].matrices == (Q,)
    assert found[rule].numbers["reach"] == pytest.approx(sigma[0] / np.linalg.norm(sigma))


def test_a_sign_that_no_spectrum_reaches_is_no_fault(build_run):
    assert failing(build_run({Q: {"sigma": EVEN}}, schedules=(AOL,))) == {}


@pytest.mark.parametrize("sigma", [HARD, EVEN, DOMINANT], ids=["hard", "even", "dominant"])
def test_sound_coefficients_are_not_blamed(build_run, sigma):
    assert failing(build_run({Q: {"sigma": sigma}}, schedules=(YOU,))) == {}
    assert failing(build_run({Q: {"sigma": sigma}})) == {}


def test_a_residual_at_its_floor(build_run):
    """One value, which Jordan's polynomial sends round its cycle; from the first step on nothing is to be had."""
    run = build_run({Q: {"sigma": EVEN}})
    curve = run["geometry"]["ns_residual"].values[0, 0]
    found = informing(run)["residual_floor"]
    step = int(found.numbers["step"])
    assert curve[step] - curve[step:].min() < 0.01
    assert curve[step - 1] - curve[step - 1 :].min() >= 0.01
    assert found.numbers["limit"] == pytest.approx(0.376, abs=5e-4)
    assert f"at its floor of {curve[step]:.3f} after {step} of 5" in found.sentence
    assert "residual_floor" not in informing(build_run({Q: {"sigma": HARD}}))


SHAPES = np.array([(48, 24), (24, 72), (128, 32), (64, 64)])


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.text)
def test_shapes_tell_causes_apart(cause):
    """With noise of 2 % and a residual that allows ±20 %, the right cause is found, alone."""
    rng = np.random.default_rng(0)
    rows, cols = SHAPES.T
    expected = np.full(4, 0.9)
    ratio = np.array([cause.factor(m, n) for m, n in SHAPES]) * expected * np.exp(rng.normal(scale=0.02, size=4))
    assert explain(ratio, expected * 0.8, expected * 1.2, expected, rows, cols) == [cause]


def test_one_shape_leaves_several_causes():
    ones = np.ones(3)
    found = explain(5 * ones, 0.9 * ones, 1.1 * ones, ones, 25 * ones, 25 * ones)
    assert [cause.text for cause in found[:2]] == ["a missing factor 0.2", CAUSES[2].text]  # √25 = 5
    assert explain(7 * ones, 0.9 * ones, 1.1 * ones, ones, 25 * ones, 25 * ones) == []


def test_growth_is_the_exponent():
    side = np.sqrt(SHAPES.max(axis=1))
    assert growth(0.3 * side**1.7, *SHAPES.T) == pytest.approx(1.7)
    assert np.isnan(growth(np.ones(2), [8, 8], [8, 8]))


def test_a_shared_learning_rate(build_run):
    matrices = {Q: {"sigma": HARD, "target": 0.05}, V: {"sigma": HARD, "optimizer": "AdamW"}}
    form = {"second_moment": {"second_moment_form": np.array([[-1, 0]])}}
    found = failing(build_run(matrices, groups=form))
    assert set(found) == {"shared_learning_rate"}
    assert "is given the learning rate of AdamW" in found["shared_learning_rate"].sentence
    assert found["shared_learning_rate"].matrices == (Q,)
    # On rates of their own they are on different scales, which may be meant.
    run = build_run(matrices, groups=form)
    run["update"]["lr"].values[:, 1] /= 10
    assert failing(run) == {}
    assert "rms_not_matched" in informing(run)


def noisy(build_run, width, steps=200, matrices=20):
    run = build_run({f"layers.{i}.attn.q_proj.weight": {"sigma": HARD, "optimizer": "AdamW"} for i in range(matrices)}, steps=range(steps))
    run["update"]["update_rms_per_lr"].values *= np.exp(np.random.default_rng(0).normal(scale=width, size=(steps, matrices)))
    return run


@pytest.mark.parametrize("width", [0.0, 0.05, 0.25])
def test_noise_is_neither_spike_nor_drift(build_run, width):
    assert not {"update_spike", "update_drift"} & set(informing(noisy(build_run, width)))


def test_a_spike_and_a_drift(build_run):
    run = noisy(build_run, 0.1)
    run["update"]["update_rms_per_lr"].values[120, 3] *= 6
    found = informing(run)
    assert found["update_spike"].matrices == ("layers.3.attn.q_proj.weight",)
    assert found["update_spike"].numbers["step"] == 120
    assert found["update_spike"].numbers["factor"] == pytest.approx(6, rel=0.4)  # ×e^{±0.1·3}
    assert "update_drift" not in found
    run["update"]["update_rms_per_lr"].values[:, 5] *= np.geomspace(1, 0.02, 200)
    found = informing(run)
    assert found["update_drift"].matrices == ("layers.5.attn.q_proj.weight",)
    # Centres of the quarters are half of the run apart, give or take half a record.
    assert found["update_drift"].numbers["factor"] == pytest.approx(0.02**0.5, rel=0.2)
    assert found["update_spike"].matrices == ("layers.3.attn.q_proj.weight",)


def test_momentum_of_norm_one(build_run):
    run = build_run({Q: {"sigma": HARD, "update": {"momentum_rms": 1 / 12}}})
    assert set(failing(run)) == {"momentum_overwritten"}
    run["update"]["momentum_rms"].values[1] *= 1.05
    assert failing(run) == {}
    # An average of gradients that are given with norm 1 may have it, too.
    assert failing(build_run({Q: {"sigma": HARD, "update": {"momentum_rms": 1 / 12, "grad_rms": 1 / 12}}})) == {}


MOMENTS = {
    # quantities of (Q, V): rule, severity, part, matrices
    "eps_dominates": ({"eps_share": [0.4, 0.0]}, "warning", "for 40% of the coordinates", (Q,)),
    "eps_near": ({"near_eps_share": [0.0, 0.6]}, "info", "for 60% of the coordinates", (V,)),
    "uneven_decay": ({"decay_spread": [2.0, 0.5]}, "warning", "at rates up to 100 times apart", (Q,)),
    "far_from_rank_1": ({"rank1_log_error": [0.6, 0.1], "rank1_information": [0.3, 0.0]}, "info", "is 0.60 decades (RMS) away", (Q,)),
    "factored_loses": (
        {"rank1_log_error": [0.6, 0.0], "rank1_information": [0.3, 0.0], "second_moment_form": [0, 1]},
        "warning",
        "Beside them 1 matrix with factors alone",
        (V,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", MOMENTS)
def test_second_moments(build_run, rule):
    quantities, severity, part, matrices = MOMENTS[rule]
    adam = {"sigma": HARD, "optimizer": "AdamW"}
    run = build_run({Q: adam, V: adam}, groups={"second_moment": {name: np.array(v)[None] for name, v in quantities.items()}})
    (found,) = check(run)
    assert (found.rule, found.severity, found.matrices) == (rule, severity, matrices)
    assert part in found.sentence


def test_rows_of_tokens_that_do_not_occur_are_no_fault(build_run):
    run = build_run({"embed.weight": {"sigma": HARD, "optimizer": "AdamW"}}, groups={"second_moment": {"eps_share": [[0.9]]}})
    assert [f.rule for f in check(run)] == ["eps_tokens"]


def test_operators_that_a_schedule_would_help(build_run):
    easy, hard = np.linspace(1, 0.3, 12), np.geomspace(1, 10**-3.5, 12)
    matrices = {f"layers.{i}.{name}.weight": {"sigma": s} for i in range(3) for name, s in (("attn.q_proj", hard), ("mlp.up_proj", easy))}
    found = informing(build_run(matrices))["steps_by_operator"]
    assert found.sentence.startswith("At the FLOPs of 5 steps for all, steps by operator (attn_q 6, mlp_up 4)")
    assert found.numbers["scheduled"] < found.numbers["uniform"]
    assert found.numbers["gain"] == pytest.approx(1 - found.numbers["scheduled"] / found.numbers["uniform"])
    assert found.matrices == tuple(f"layers.{i}.attn.q_proj.weight" for i in range(3))
    assert "steps_by_operator" not in informing(build_run({name: {"sigma": easy} for name in matrices}))


def test_parts_of_a_matrix_that_are_unlike(build_run, add_rows):
    whole = "layers.0.attn.qkv.weight"

    def run(query, key):
        rows = {
            f"{whole}[{part}]": {
                "shape": (8, 8), "operator": f"attn_{part}", "block_condition_number": kappa, "block_stable_rank": 3.0, "block_update_rms_per_lr": size,
            }
            for part, (kappa, size) in (("q", query), ("k", key))
        }  # fmt: skip
        return add_rows(build_run({whole: {"sigma": np.geomspace(1, 1e-4, 8), "shape": (16, 8)}}), "blocks", rows)

    found = informing(run((10.0, 0.2), (1000.0, 0.6)))["unlike_blocks"]
    assert found.sentence == (
        "The parts of attn_qkv matrices differ within one matrix: condition numbers 100 times apart and updates 3 times apart (median)."
    )
    assert found.matrices == (whole,)
    assert found.advice.startswith("Orthogonalise them one by one")
    own = run((10.0, 0.2), (1000.0, 0.6))
    own["geometry"]["ns_schedule"].values[:] = -1  # nothing is orthogonalised here, nor should the advice say so
    assert informing(own)["unlike_blocks"].advice.startswith("Nothing;")
    assert "unlike_blocks" not in informing(run((10.0, 0.2), (50.0, 0.25)))


def test_odd_runs_are_passed_over(build_run):
    """Everything missing, one record, vectors only, variables that older versions did not have: no rule raises."""
    matrices = {Q: {"sigma": HARD}, V: {"sigma": HARD, "optimizer": "AdamW"}}
    whole = build_run(matrices, groups={"second_moment": {}, "blocks": {}, "gradient": {}}, attrs={"optimizers": [{"label": "Muon"}, {}]})
    for name in ("second_moment", "blocks", "gradient"):
        assert failing(whole) == {}
        del whole[name]
    assert failing(build_run(matrices, steps=(1,))) == {}
    assert failing(build_run({Q: {"sigma": (1.0,), "optimizer": "AdamW"}})) == {}
    assert failing(build_run({Q: {"sigma": [None] * 3}, V: {"sigma": [None] * 3, "optimizer": "AdamW"}})) == {}
    assert "not_finite" in failing(build_run({Q: {"sigma": HARD, "update": dict.fromkeys(("update_rms", "update_rms_per_lr"), np.nan)}}))
    for group in ("geometry", "update"):
        for variable in set(whole[group].data_vars) - {"condition_number"}:
            older = build_run(matrices)
            older[group] = xr.DataTree(older[group].to_dataset().drop_vars(variable))
            check(older)
