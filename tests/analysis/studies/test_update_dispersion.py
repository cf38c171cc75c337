"""Rows and columns of O: what exact polar factors of random matrices have, and what stands out from it."""

import numpy as np
import pytest

from optiscope.analysis import update_dispersion

SHAPES = {"attn.q_proj": (24, 24), "mlp.up_proj": (96, 24), "mlp.down_proj": (24, 96)}


def dispersion(o):
    squared = (o**2).sum(axis=1)
    return squared.std() / squared.mean()


def polar(rng, shape):
    u, _, vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    return u @ vt


@pytest.fixture
def exact(build_run):
    """A run whose O are exact polar factors of Gaussian matrices, 8 layers."""
    rng = np.random.default_rng(0)
    matrices = {f"layers.{i}.{part}.weight": {"sigma": np.ones(24), "shape": shape} for i in range(8) for part, shape in SHAPES.items()}
    o = [polar(rng, m["shape"]) for m in matrices.values()]
    values = {"row_dispersion": [dispersion(m) for m in o], "column_dispersion": [dispersion(m.T) for m in o]}
    return build_run(matrices, groups={"geometry": {name: np.array(value) for name, value in values.items()}})


def test_exact_random_updates_lie_on_the_null(exact):
    found = update_dispersion.study(exact)
    null = np.sqrt(2 * (96 - 24) / (24 * (96 + 2)))
    np.testing.assert_allclose(found["row_null"].sel(operator=["attn_q", "mlp_up", "mlp_down"]), [0, null, 0], rtol=1e-12)
    np.testing.assert_allclose(found["column_null"].sel(operator=["attn_q", "mlp_up", "mlp_down"]), [0, 0, null], rtol=1e-12)
    # One matrix scatters by about 1/√(2·96) of itself, the median of 8 by 1.25/√8 of that: 3.2 %; three of those.
    for name, operator in (("row", "mlp_up"), ("column", "mlp_down")):
        assert float(found[f"median_{name}"].sel(operator=operator)) == pytest.approx(null, rel=0.1)
        assert float(found[f"median_{name}_low"].sel(operator=operator)) < null * 1.1
    # On the short side rows of a polar factor are equally long, up to float64's rounding: 1e-15.
    for name, operator in (("row", "attn_q"), ("column", "attn_q"), ("row", "mlp_down"), ("column", "mlp_up")):
        assert float(found[f"median_{name}"].sel(operator=operator)) < 1e-12


def test_the_operator_beyond_chance_is_named(build_run):
    matrices = {f"layers.0.{part}.weight": {"sigma": np.ones(24), "shape": shape} for part, shape in SHAPES.items()}
    rows, columns = np.array([0.1, 0.25, 0.3]), np.array([0.02, 0.05, 0.3])
    found = update_dispersion.study(build_run(matrices, groups={"geometry": {"row_dispersion": rows, "column_dispersion": columns}}))
    # 0.25 of the tall matrix is what chance gives (0.247): the wide one's rows stand out.
    text = update_dispersion.summary(found)
    assert "vary most beyond chance in mlp_down: by 0.3 of their mean, where an exactly orthogonalised random matrix has 0;" in text
    assert "column norms in mlp_down: 0.3 against 0.247" in text


def test_gaps_are_left_out(build_run):
    matrices = {f"layers.{i}.attn.q_proj.weight": {"sigma": np.ones(8)} for i in range(3)}
    rows = np.array([[0.1, np.nan, np.nan], [0.3, np.nan, 0.5], [np.nan, np.nan, 0.7]])
    found = update_dispersion.study(build_run(matrices, groups={"geometry": {"row_dispersion": rows, "column_dispersion": rows}}))
    np.testing.assert_allclose(found["row"][:, 0], [0.1, 0.4, 0.7], rtol=1e-6)
    np.testing.assert_allclose(found["median_row"], [(0.2 + 0.6) / 2], rtol=1e-6)


def test_what_is_missing_is_said(build_run):
    run = build_run({"layers.0.attn.q_proj.weight": {"sigma": np.ones(8)}})
    with pytest.raises(ValueError, match=r"^run: the orthogonalised update O is known of no matrix in it"):
        update_dispersion.study(run)
    run["geometry"] = run["geometry"].to_dataset().drop_vars(["row_dispersion", "column_dispersion"])
    with pytest.raises(
        ValueError,
        match=r"^run: recorded by an earlier version, without row_dispersion, column_dispersion; to record it, attach with measure",
    ):
        update_dispersion.study(run)
