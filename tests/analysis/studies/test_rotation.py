"""Drift and gain of a kept rotation: of real rotations that settle, per operator and over training."""

import numpy as np
import pytest

from optiscope.analysis import rotation

STEPS = (10, 20, 30, 40)


def turned(angle):
    """The drift of a rotation by `angle` in one plane of four dimensions: 1 − (2cos² + 2)/4."""
    r = np.eye(4)
    r[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return 1 - np.mean(np.diag(r) ** 2)


@pytest.fixture
def run(build_run):
    names = [f"layers.{i}.{part}.weight" for i in range(3) for part in ("attn.q_proj", "mlp.up_proj")]
    drift = np.array([[turned(angle)] * 6 for angle in (np.pi / 2, 0.5, 0.1, 0.0)])
    gain = np.tile([1.5, 0.9], (4, 3)) + 0.01 * np.repeat([0, 1, 2], 2)
    groups = {"geometry": {"rotation_drift": drift, "rotation_gain": gain}}
    return build_run({name: {"sigma": np.ones(4)} for name in names}, steps=STEPS, groups=groups)


def test_a_rotation_that_settles(run):
    found = rotation.study(run)
    expected = np.sin([np.pi / 2, 0.5, 0.1, 0.0]) ** 2 / 2
    for operator in ("attn_q", "mlp_up"):
        np.testing.assert_allclose(found["drift"].sel(operator=operator), expected, atol=1e-7)
    np.testing.assert_allclose(found["median_gain"], [1.51, 0.91], rtol=1e-6)
    np.testing.assert_allclose(found["gain_lower"][0], [1.505, 0.905], rtol=1e-6)
    assert rotation.summary(found) == (
        "The rotation's drift in one step is 0.5 at step 10 and 0 at step 40 (median over operators); rotating multiplies ⟨M, update⟩ by 1.21 "
        "(median; mlp_up 0.91 to attn_q 1.51)."
    )


def test_one_record_without_a_gain(build_run):
    name = "layers.0.attn.q_proj.weight"
    run = build_run({name: {"sigma": np.ones(4)}}, steps=(7,), groups={"geometry": {"rotation_drift": 0.25}})
    assert rotation.summary(rotation.study(run)) == "The rotation's drift in one step is 0.25 at step 7; what rotating gains is not known."


def test_only_matrices_with_a_rotation_are_studied(run):
    run["geometry"]["rotation_drift"][:, [1, 3, 5]] = np.nan
    assert rotation.study(run)["operator"].values.tolist() == ["attn_q"]


def test_what_is_missing_is_said(build_run):
    run = build_run({"layers.0.attn.q_proj.weight": {"sigma": np.ones(4)}})
    with pytest.raises(ValueError, match=r"^run: no optimizer in it keeps a rotation \(ARO does\)"):
        rotation.study(run)
    run["geometry"] = run["geometry"].to_dataset().drop_vars("rotation_drift")
    with pytest.raises(ValueError, match=r"^run: recorded by an earlier version, without rotation_drift"):
        rotation.study(run)
