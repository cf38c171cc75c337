"""The gradient's spectrum beside the momentum's: differences in decades, and spectra on one scale."""

import numpy as np
import pytest

from optiscope.analysis import gradient_spectrum
from optiscope.diagnostics.spectra.spectrum_sketch import sketch

NAMES = [f"layers.{i}.{part}.weight" for i in range(4) for part in ("attn.q_proj", "mlp.up_proj")]


def log_uniform(decades, rank=8):
    return np.logspace(0, -decades, rank)


def gradient_of(sigmas, floor=False, cosine=0.5):
    """The recorded quantities of gradients with these singular values, one per matrix."""
    x = [sigma / np.linalg.norm(sigma) for sigma in sigmas]
    return {
        "gradient_sigma_quantile": np.stack([sketch(values) for values in x]),
        "gradient_condition_number": np.array([values[0] / values[-1] for values in x]),
        "gradient_condition_is_floor": floor,
        "gradient_stable_rank": np.array([1 / values[0] ** 2 for values in x]),
        "gradient_cosine": cosine,
    }


def stable_rank(sigma):
    return (sigma**2).sum() / sigma[0] ** 2


@pytest.fixture
def run(build_run):
    """Gradients of 3 decades, momenta of 2 (queries) and 1 (MLP), the same in all layers."""
    matrices = {name: {"sigma": log_uniform(2 if "attn" in name else 1)} for name in NAMES}
    cosine = np.linspace(0.1, 0.3, 3)[:, None]
    return build_run(matrices, groups={"gradient": gradient_of([log_uniform(3)] * 8, cosine=cosine)})


def test_changes_are_decades(run):
    found = gradient_spectrum.study(run)
    np.testing.assert_allclose(found["condition_number_change"], [-1, -2], rtol=1e-6)
    np.testing.assert_allclose(found["condition_number"], [[1e3, 1e3], [1e2, 1e1]], rtol=1e-6)
    for operator, decades in (("attn_q", 2), ("mlp_up", 1)):
        expected = np.log10(stable_rank(log_uniform(decades)) / stable_rank(log_uniform(3)))
        assert float(found["stable_rank_change"].sel(operator=operator)) == pytest.approx(expected, abs=1e-6)
        # All layers alike: the interval is the number.
        for end in ("low", "high"):
            assert float(found[f"stable_rank_change_{end}"].sel(operator=operator)) == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(found["cosine"], [[0.1] * 2, [0.2] * 2, [0.3] * 2], rtol=1e-6)
    text = gradient_spectrum.summary(found)
    assert "condition number by -1.50 (median; mlp_up -2.00 to attn_q -1.00)" in text
    assert text.endswith("and has a cosine of 0.20 with it.")


def test_spectra_are_compared_at_the_same_quantiles(run):
    found = gradient_spectrum.study(run)
    # log σ is linear in the quantile for every rank: half the matrices fall over 2 decades and half over 1.
    norm = {decades: np.log10(np.linalg.norm(log_uniform(decades))) for decades in (1, 2, 3)}
    for level in (0.0, 0.25, 1.0):
        one = found.sel(level=level)
        assert float(one["spectrum"].sel(of="gradient")) == pytest.approx(3 * (level - 1) - norm[3], abs=1e-6)
        both = [decades * (level - 1) - norm[decades] for decades in (1, 2)]
        assert float(one["spectrum"].sel(of="momentum")) == pytest.approx(np.mean(both), abs=1e-6)
        assert float(one["spectrum_lower"].sel(of="momentum")) == pytest.approx(min(both), abs=1e-6)
        assert float(one["spectrum_upper"].sel(of="momentum")) == pytest.approx(max(both), abs=1e-6)


def test_lower_bounds_are_not_compared(build_run):
    matrices = {name: {"sigma": log_uniform(2)} for name in NAMES}
    floor = np.zeros((3, 8), dtype=bool)
    floor[:, 0], floor[0, 2] = True, True
    decades = np.full((3, 8), 3.0)
    decades[:, 0], decades[0, 2] = 9, 9
    gradient = gradient_of([log_uniform(3)] * 8, floor=floor) | {"gradient_condition_number": 10**decades}
    found = gradient_spectrum.study(build_run(matrices, groups={"gradient": gradient}))
    np.testing.assert_allclose(found["condition_number_change"], [-1, -1], rtol=1e-6)
    np.testing.assert_allclose(found["floor_share"], [4 / 24, 0])
    assert "17% of the gradients' and 0% of the momenta's κ are only lower bounds" in gradient_spectrum.summary(found)
    # Nothing but bounds: the stable rank remains.
    everywhere = build_run({n: {**m, "floor": True} for n, m in matrices.items()}, groups={"gradient": gradient})
    found = gradient_spectrum.study(everywhere)
    assert np.isnan(found["condition_number_change"]).all()
    assert "condition number" not in gradient_spectrum.summary(found)


def test_only_records_and_matrices_of_both_groups_count(run):
    run["gradient"] = run["gradient"].to_dataset().isel(step=[1, 2], matrix=[6, 0, 2, 4])
    run["geometry"] = run["geometry"].to_dataset().isel(step=[0, 1], matrix=[0, 1, 2, 3, 4, 5])
    found = gradient_spectrum.study(run)
    assert found["operator"].values.tolist() == ["attn_q"]
    assert found["step"].values.tolist() == [20]
    np.testing.assert_allclose(found["condition_number_change"], [-1], rtol=1e-6)
    assert float(found["spectrum"].sel(of="momentum", level=0)) == pytest.approx(-2 - np.log10(np.linalg.norm(log_uniform(2))), abs=1e-6)


def test_what_is_missing_is_said(build_run):
    matrices = {NAMES[0]: {"sigma": log_uniform(2)}}
    with pytest.raises(ValueError, match=r"^run: no gradient records; to record them, attach with measure=\(…, 'gradient'\)"):
        gradient_spectrum.study(build_run(matrices))
    with pytest.raises(ValueError, match=r"^run: every recorded gradient is zero or not finite"):
        gradient_spectrum.study(build_run(matrices, groups={"gradient": {}}))
    run = build_run({NAMES[0]: {"sigma": [None] * 3, "shape": (8, 8)}}, groups={"gradient": gradient_of([log_uniform(3)])})
    with pytest.raises(ValueError, match=r"^run: every recorded NS input is zero or not finite"):
        gradient_spectrum.study(run)
