"""What bfloat16 adds: the studied curves of a real bfloat16 iteration, and from where on it only orthogonalises noise."""

import numpy as np
import pytest
import torch

from optiscope.analysis import precision_split
from optiscope.diagnostics.newton_schulz.families import FAMILIES, repeat_last

PE = repeat_last(FAMILIES["polar_express"].coefficients, 10)
NAMES = [f"layers.{i}.attn.q_proj.weight" for i in range(3)]


def bfloat16_residuals(m, coefficients):
    """Gram and polar residual after 0, 1, … steps of the iteration in bfloat16, as a training runs it, in torch."""
    u, _, vt = np.linalg.svd(m, full_matrices=False)
    x = torch.from_numpy(m).bfloat16()
    x = x / x.norm()
    found = []
    for a, b, c in (*coefficients, (0, 0, 0)):
        o = x.double().numpy()
        r = len(o)
        found.append((np.linalg.norm(np.eye(r) - o @ o.T) / np.sqrt(r), np.linalg.norm(o - u @ vt) / np.sqrt(r)))
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return np.array(found).T


def log_uniform(kappa, m=128, n=256, seed=0):
    """A matrix with singular values equally spaced in their logarithm, and these."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((size, m)))[0] for size in (m, n))
    sigma = np.logspace(0, -np.log10(kappa), m)
    return (u * sigma) @ v.T, sigma


def built(build_run, matrices, gram, polar, **more):
    groups = {
        "precision": {"ns_residual_bfloat16": gram, "ns_residual_polar_bfloat16": polar},
        "geometry": {"recoverable_share": 0.75},
        **more,
    }
    return build_run(matrices, steps=(10, 20), schedules=(PE[:5],), groups=groups)


@pytest.mark.parametrize(
    ("kappa", "at"),
    [
        (1e3, {5: (0.319, 0.252), 6: (0.145, 0.200), 8: (0.007, 0.202), 10: (0.006, 0.203)}),
        (1e4, {5: (0.519, 0.495), 6: (0.387, 0.476), 8: (0.065, 0.546), 10: (0.006, 0.559)}),
    ],
)
def test_a_real_bfloat16_iteration_orthogonalises_noise_from_step_6_on(build_run, kappa, at):
    m, sigma = log_uniform(kappa)
    gram, polar = bfloat16_residuals(m, PE)
    # The reference's own draw of the singular vectors is not known; three draws here differ from it by 0.0015 to 0.008.
    for k, (expected_gram, expected_polar) in at.items():
        assert gram[k] == pytest.approx(expected_gram, abs=0.015)
        assert polar[k] == pytest.approx(expected_polar, abs=0.015)
    found = precision_split.study(built(build_run, {NAMES[0]: {"sigma": sigma, "shape": m.shape}}, gram, polar))
    np.testing.assert_allclose(found["overall"].sel(arithmetic="bfloat16"), [gram, polar], rtol=1e-6)  # stored as float32
    # Exact arithmetic goes on: what further steps could have gained.
    assert float(found["overall"].sel(arithmetic="exact", kind="polar", k=10)) < 0.11
    assert float(found["overall_noise_from"]) == 6
    assert found["noise_from"].values.tolist() == [6]
    text = precision_split.summary(found)
    assert f"After 5 steps bfloat16 leaves ε̃ = {gram[5]:.3g} and ε_pol = {polar[5]:.3g}" in text
    assert (
        f"from step 6 on further bfloat16 steps orthogonalise rounding noise: by step {6 + 1 + np.argmin(gram[7:])} ε̃ goes from {gram[6]:.3g}"
        in text
    )
    assert "attn_q has most singular values below bfloat16's floor, 25.0%" in text


@pytest.mark.parametrize(
    ("exact", "gram", "polar", "expected"),
    [
        ([1, 0.5, 0.2, 0.1], [1, 0.5, 0.3, 0.1], [1, 0.6, 0.6, 0.7], 1),  # the direction stays, the residual falls
        ([1, 0.5, 0.2, 0.1], [1, 0.5, 0.3, 0.1], [1, 0.6, 0.3, 0.2], None),  # both fall to the end
        ([1, 0.5, 0.6, 0.7], [1, 0.5, 0.3, 0.1], [1, 0.5, 0.6, 0.7], None),  # a schedule that is best after one step, in any arithmetic
        ([1, 0.5, 0.2, 0.1], [1, 0.5, 0.5, 0.6], [1, 0.6, 0.6, 0.7], None),  # nothing is orthogonalised either
        ([1, 0.5, 0.2, np.nan], [1, 0.5, 0.3, np.nan], [1, 0.6, 0.7, np.nan], 1),  # diverged later
    ],
)
def test_where_noise_begins(exact, gram, polar, expected):
    found = precision_split.noise_from(np.array([exact, exact, gram, polar], float))
    assert np.isnan(found) if expected is None else found == expected


def test_curves_are_means_over_matrices_of_means_over_records(build_run):
    matrices = {name: {"sigma": np.linspace(1, 0.2, 8)} for name in NAMES}
    gram, polar = np.random.default_rng(0).uniform(0.1, 0.9, (2, 2, 3, 11))
    gram[1, 0] = np.nan  # one record of the first matrix; none of the last
    polar[:, 2] = np.nan
    found = precision_split.study(built(build_run, matrices, gram, polar))
    low = found["overall"].sel(arithmetic="bfloat16")
    np.testing.assert_allclose(low.sel(kind="gram"), (gram[0, 0] + gram[:, 1].mean(axis=0)) / 2, rtol=1e-6)
    np.testing.assert_allclose(low.sel(kind="polar"), (polar[0, 0] + polar[:, 1].mean(axis=0)) / 2, rtol=1e-6)
    np.testing.assert_array_equal(found["residual"].sel(operator="attn_q"), found["overall"])
    assert found["steps"].values.tolist() == [5]


def test_shares_below_the_floor_have_bars_over_layers(build_run):
    matrices = {f"layers.{i}.{part}.weight": {"sigma": np.linspace(1, 0.2, 8)} for i in range(5) for part in ("attn.q_proj", "mlp.up_proj")}
    share = np.array([[0.9, 0.5, 0.8, 0.5, 0.7, 0.5, 0.6, 0.5, 0.5, 0.5]] * 2)
    found = precision_split.study(built(build_run, matrices, 0.5, 0.5, geometry={"recoverable_share": share}))
    np.testing.assert_allclose(found["below_floor"], [0.3, 0.5], rtol=1e-6)
    low, high = (found[f"below_floor_{end}"].sel(operator="attn_q") for end in ("low", "high"))
    assert 0.1 - 1e-6 <= low < 0.3 < high <= 0.5 + 1e-6
    # All layers alike.
    assert float(found["below_floor_low"].sel(operator="mlp_up")) == float(found["below_floor_high"].sel(operator="mlp_up"))


def test_what_is_missing_is_said(build_run):
    matrices = {NAMES[0]: {"sigma": np.linspace(1, 0.2, 8)}}
    with pytest.raises(ValueError, match=r"^run: no precision records; to record them, attach with measure=\(…, 'precision'\)"):
        precision_split.study(build_run(matrices))
    with pytest.raises(ValueError, match=r"^run: no optimizer in it orthogonalises"):
        precision_split.study(built(build_run, matrices, np.nan, np.nan))
    run = built(build_run, matrices, 0.5, 0.5)
    run["geometry"] = run["geometry"].to_dataset().drop_vars("recoverable_share")
    with pytest.raises(ValueError, match=r"^run: recorded by an earlier version, without recoverable_share"):
        precision_split.study(run)
    run = built(build_run, matrices, np.array([0.5, np.nan])[:, None, None], 0.5)
    run["geometry"]["ns_residual"][0] = np.nan
    with pytest.raises(ValueError, match=r"^run: no record holds both the exact and the bfloat16 residuals"):
        precision_split.study(run)
