"""The first against the last third of the layers, by hand."""

import numpy as np
import pytest

from optiscope.analysis import shallow_vs_deep


def run_of(build_run, layers, operators=("attn.q_proj", "mlp.up_proj"), **changes):
    """κ = 10·(layer + 1) for the first operator, 1000 times that for the second, and so on."""
    matrices = {
        f"layers.{layer}.{operator}.weight": {"sigma": (10.0 * (layer + 1) * 1000.0**i, 1.0)}
        for layer in range(layers)
        for i, operator in enumerate(operators)
    }
    return build_run({**matrices, **changes})


# layers: how many make a third, and the medians of layer + 1 over both.
@pytest.mark.parametrize(
    ("layers", "third", "shallow", "deep"), [(2, 1, 1, 2), (5, 1, 1, 5), (6, 2, 1.5, 5.5), (7, 2, 1.5, 6.5), (9, 3, 2, 8)]
)
def test_thirds(build_run, layers, third, shallow, deep):
    found = shallow_vs_deep.study(run_of(build_run, layers), ["attn_q"])
    assert found.attrs["layers_per_third"] == third
    np.testing.assert_allclose(found["median"].sel(depth="shallow", operator="attn_q"), 10 * shallow)
    np.testing.assert_allclose(found["median"].sel(depth="deep", operator="attn_q"), 10 * deep)


def test_by_default_the_hardest_and_the_easiest_operator(build_run):
    run = run_of(build_run, 3, ("attn.k_proj", "attn.q_proj", "mlp.up_proj"))
    assert shallow_vs_deep.study(run)["operator"].values.tolist() == ["mlp_up", "attn_k"]
    assert shallow_vs_deep.study(run_of(build_run, 3, ("attn.k_proj",)))["operator"].values.tolist() == ["attn_k"]


def test_the_summary_tells_decades(build_run):
    found = shallow_vs_deep.study(run_of(build_run, 10, ("attn.q_proj",)))
    # Medians of 1 … 3 and 8 … 10.
    # Every resampled median lies in 1 … 3 and 8 … 10: the difference has log10(8/3) = 0.43 and log10(10) = 1 as its extremes.
    text = f"Deep over shallow layers, decades of κ (median over records): attn_q {np.log10(9 / 2):+.2f} (95 % +0.43 to +1.00), which excludes zero."
    assert shallow_vs_deep.summary(found) == text


def test_an_operator_that_is_not_there_is_named(build_run):
    with pytest.raises(ValueError, match=r"^operators: attn_v, nothing not in shallow and deep layers of this run; attn_q, mlp_up are$"):
        shallow_vs_deep.study(run_of(build_run, 3), ["attn_v", "attn_q", "nothing"])


def test_operators_of_one_depth_only_are_not_chosen(build_run):
    changes = {"layers.0.attn.v_proj.weight": {"sigma": (1e9, 1.0)}, "layers.2.attn.o_proj.weight": {"sigma": [None] * 3, "shape": (2, 2)}}
    run = run_of(build_run, 3, **changes)
    assert shallow_vs_deep.study(run)["operator"].values.tolist() == ["mlp_up", "attn_q"]
    with pytest.raises(ValueError, match="operators: attn_v not in shallow and deep layers"):
        shallow_vs_deep.study(run, ["attn_v"])


def test_matrices_outside_the_layers_do_not_count(build_run):
    run = run_of(build_run, 3, **{"q_proj.weight": {"sigma": (1e9, 1.0)}})
    np.testing.assert_allclose(shallow_vs_deep.study(run, ["attn_q"])["median"].sel(depth="shallow"), 10)


@pytest.mark.parametrize(
    "names", [("layers.0.attn.q_proj.weight",), ("q_proj.weight",), ("layers.0.attn.q_proj.weight", "layers.1.mlp.up_proj.weight")]
)
def test_one_depth_cannot_be_compared(build_run, names):
    with pytest.raises(ValueError, match="no operator has spectra both in shallow and in deep layers"):
        shallow_vs_deep.study(build_run({name: {"sigma": (2.0, 1.0)} for name in names}))


def test_the_difference_and_its_error_bar_are_those_of_a_naive_bootstrap(build_run, resample):
    rng = np.random.default_rng(2)
    log_kappa = rng.uniform(0.5, 2, (12, 3))  # of layers and records; a third is four layers
    matrices = {
        f"layers.{i}.attn.q_proj.weight": {"sigma": [(10**value, 1.0) for value in row]} for i, row in enumerate(log_kappa.tolist())
    }
    found = shallow_vs_deep.study(build_run(matrices))
    shallow, deep = np.median(log_kappa[:4], axis=1), np.median(log_kappa[8:], axis=1)
    assert float(found["difference"][0]) == pytest.approx(np.median(deep) - np.median(shallow), rel=1e-12)
    expected = resample(lambda s, d: np.median(deep[d]) - np.median(shallow[s]), range(4), range(4))
    np.testing.assert_allclose([found["difference_low"][0], found["difference_high"][0]], expected, rtol=1e-12)
    assert expected[0] < 0 < expected[1]
    assert shallow_vs_deep.summary(found).endswith(", which may be chance.")


def test_few_layers_have_no_error_bar(build_run):
    found = shallow_vs_deep.study(run_of(build_run, 6, ("attn.q_proj",)))
    assert float(found["difference"][0]) == pytest.approx((np.log10(5 * 6) - np.log10(1 * 2)) / 2)
    assert np.isnan([found["difference_low"], found["difference_high"]]).all()
    assert shallow_vs_deep.summary(found).endswith("With fewer than three layers to a third, what is chance is not known.")
