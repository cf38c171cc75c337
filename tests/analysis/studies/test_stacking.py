"""Stacking pairs of layers: pairs built to share left directions must pay side by side, and only there."""

import numpy as np
import pytest

from optiscope.analysis import stacking

LAYERS = 6


def kappa(m):
    sigma = np.linalg.svd(m, compute_uv=False)
    return sigma[0] / sigma[-1]


def pair_quantities(first, second, q):
    """What is recorded of a pair, written out with full SVDs."""
    (u1, _, v1), (u2, _, v2) = np.linalg.svd(first), np.linalg.svd(second)
    overlap = [np.linalg.norm(a[:, :q].T @ b[:, :q]) ** 2 / q for a, b in ((u1, u2), (v1.T, v2.T))]
    grams = [[m @ m.T / np.trace(m @ m.T) for m in pair] for pair in ((first, second), (first.T, second.T))]
    stacks = [kappa(np.hstack([first, second])), kappa(np.vstack([first, second]))]
    return {
        "shape": first.shape,
        "subspace_overlap": overlap,
        "subspace_overlap_null": [q / len(u1), q / len(v1)],
        "gram_distance": [np.linalg.norm(a - b) / 2 for a, b in grams],
        "stack_condition_number": stacks,
        "stack_condition_gain": np.log10(max(kappa(first), kappa(second)) / np.array(stacks)),
    }


def name(layer, part="attn.q_proj"):
    return f"layers.{layer}.{part}.weight"


@pytest.fixture
def pairs():
    """Matrices of 16×24 with a leading left subspace of 2 directions that all layers share, and right vectors of their own."""
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    sigma = np.concatenate([[1.0, 0.9], np.logspace(-1, -2, 14)])
    matrices = [(u * sigma) @ np.linalg.qr(rng.standard_normal((24, 16)))[0].T for _ in range(LAYERS)]
    # A weak direction of each layer is lost: its κ suffers, the stack's does not.
    matrices = [m - (1 - 1e-2) * np.outer(u[:, 2 + i], u[:, 2 + i] @ m) for i, m in enumerate(matrices)]
    return {f"{name(i)}|{name(i + 1)}": pair_quantities(matrices[i], matrices[i + 1], 2) for i in range(LAYERS - 1)}


@pytest.fixture
def base(build_run):
    return build_run({name(i): {"sigma": np.linspace(1, 0.2, 8)} for i in range(LAYERS)})


def test_layers_that_share_left_directions_pay_side_by_side(base, add_rows, pairs):
    found = stacking.study(add_rows(base, "stacking", pairs))
    by_hand = {key: np.array([row[key] for row in pairs.values()]) for key in ("subspace_overlap", "gram_distance", "stack_condition_gain")}
    # Shared subspaces overlap 8 times as much as two random directions out of 16.
    np.testing.assert_allclose(found["overlap_ratio"].sel(side="left"), 8, rtol=0.02)
    np.testing.assert_allclose(found["overlap_ratio"].sel(side="right"), by_hand["subspace_overlap"][:, 1] * 12, rtol=1e-6)
    for variable, key in (("gain", "stack_condition_gain"), ("gram_distance", "gram_distance")):
        np.testing.assert_allclose(found[variable], by_hand[key], rtol=1e-5)
        np.testing.assert_allclose(found[f"{variable}_median"].sel(of_operator="attn_q"), np.median(by_hand[key], axis=0), rtol=1e-5)
    assert found["pays"].sel(of_operator="attn_q", side="left")
    assert not found["pays"].sel(of_operator="attn_q", side="right")
    text = stacking.summary(found)
    assert text.startswith("Stacking pairs of layers can pay for attn_q side by side (8.0 times the overlap of random ones")
    assert "one over the other" not in text


def test_random_matrices_do_not_pay_though_their_stack_is_better_conditioned(base, add_rows):
    rng = np.random.default_rng(1)
    matrices = rng.standard_normal((LAYERS, 16, 16))
    rows = {f"{name(i)}|{name(i + 1)}": pair_quantities(matrices[i], matrices[i + 1], 4) for i in range(LAYERS - 1)}
    found = stacking.study(add_rows(base, "stacking", rows))
    assert (found["gain_median"] > 0.5).all()
    assert not found["pays"].any()
    # It is what their shape gives: over 5 pairs of square matrices log10 κ scatters by 0.4.
    np.testing.assert_allclose(found["gain_median"], found["gain_of_shape"], atol=0.6)
    assert stacking.summary(found).startswith("For no operator is it sure that pairs of layers share at least 2 times")


def test_the_gain_of_shape_is_that_of_gaussian_pairs(base, add_rows):
    row = {"subspace_overlap": 0.5, "subspace_overlap_null": 0.1, "gram_distance": 0.1, "stack_condition_gain": 0.0}
    shape = (12, 20)
    found = stacking.study(add_rows(base, "stacking", {f"{name(0)}|{name(1)}": {"shape": shape, **row}}))
    rng = np.random.default_rng(2)
    gains = []
    for _ in range(400):
        first, second = rng.standard_normal((2, *shape))
        worse = max(kappa(first), kappa(second))
        gains.append(np.log10([worse / kappa(np.hstack([first, second])), worse / kappa(np.vstack([first, second]))]))
    # Of medians over 64 draws: 1.25·0.12/8 = 0.02 each, two of them.
    np.testing.assert_allclose(found["gain_of_shape"][0], np.median(gains, axis=0), atol=0.08)


@pytest.mark.parametrize(("overlap", "gain", "pays"), [(0.3, 0.1, True), (0.3, -0.1, False), (0.15, 0.1, False)])
def test_one_pair_is_judged_by_itself(base, add_rows, overlap, gain, pays):
    row = {"shape": (8, 8), "subspace_overlap": overlap, "subspace_overlap_null": 0.1, "gram_distance": 0.1, "stack_condition_gain": gain}
    found = stacking.study(add_rows(base, "stacking", {f"{name(0)}|{name(1)}": row}))
    assert (found["pays"] == pays).all()


def test_pairs_that_disagree_do_not_pay(base, add_rows):
    row = {"shape": (8, 8), "subspace_overlap_null": 0.1, "gram_distance": 0.1, "stack_condition_gain": 0.5}
    overlap = [0.9, 0.9, 0.9, 0.1, 0.1]
    rows = {f"{name(i)}|{name(i + 1)}": {**row, "subspace_overlap": overlap[i]} for i in range(5)}
    found = stacking.study(add_rows(base, "stacking", rows))
    # The median is 9 times the null's, but resampled layers often hold more of the others.
    np.testing.assert_allclose(found["overlap_ratio_median"], 9, rtol=1e-6)
    assert not found["pays"].any()


def test_what_is_missing_is_said(base, add_rows):
    with pytest.raises(ValueError, match=r"^run: no stacking records; to record them, attach with measure=\(…, 'stacking'\)"):
        stacking.study(base)
    with pytest.raises(ValueError, match=r"^run: no two of its matrices were comparable"):
        stacking.study(add_rows(base, "stacking", {f"{name(0)}|{name(1)}": {"shape": (8, 8)}}))
