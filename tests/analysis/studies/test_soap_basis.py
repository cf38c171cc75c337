"""Kronecker factors and the second moment in their eigenbasis: both sides, with and without a basis that is kept."""

import numpy as np
import pytest

from optiscope.analysis import soap_basis

NAMES = [f"layers.{layer}.{part}.weight" for layer in range(3) for part in ("attn.q_proj", "mlp.up_proj")]
SIDES = np.tile([[1.0, 2.0]], (3, 6, 1))


def moments(build_run, **quantities):
    base = {
        "factor_condition": 100 * SIDES,
        "factor_effective_rank": SIDES,
        "eigenbasis_off_diagonal": 0.1 * SIDES,
        "eigenbasis_information": 0.2,
    }
    matrices = {name: {"sigma": (2.0, 1.0), "optimizer": "SOAP"} for name in NAMES} | {
        "layers.0.mlp.down_proj.weight": {"sigma": (2.0, 1.0)}
    }
    groups = {name: _padded(value) for name, value in {**base, **quantities}.items()}
    return build_run(matrices, groups={"second_moment": groups})


def _padded(value):
    """With a last matrix that has none of it."""
    value = np.broadcast_to(value, (3, 6, *np.shape(value)[2:]))
    return np.concatenate([value, np.full((3, 1, *value.shape[2:]), np.nan)], axis=1)


def test_medians_per_operator_and_side(build_run):
    condition = 100 * SIDES
    condition[:, 0::2] = [[10, 1000], [20, 2000], [90, 9000]]
    found = soap_basis.study(moments(build_run, factor_condition=condition))
    assert found["operator"].values.tolist() == ["attn_q", "mlp_up"]
    np.testing.assert_allclose(found["condition"].isel(step=0), [[20, 2000], [100, 200]])
    np.testing.assert_allclose(found["off_diagonal"].sel(side="right"), 0.2, rtol=1e-6)
    assert np.isnan(found["exponent"]).all()
    text = soap_basis.summary(found)
    assert text.startswith(
        "Kronecker factors have condition numbers up to 2e+03 (attn_q) and effective ranks up to 2; V' in their eigenbasis holds 0.2 (median; "
    )
    assert text.endswith("Off the diagonal of the kept basis lies up to 20.0% of the energy (attn_q).")


def test_information_in_the_weights_own_basis_is_shown_where_known(build_run):
    found = soap_basis.study(moments(build_run, rank1_information=0.7))
    np.testing.assert_allclose(found["plain_information"], 0.7, rtol=1e-6)
    assert ", 0.5 less than v in the weights' own basis" in soap_basis.summary(found)
    assert "dotted" in soap_basis.plot(found).axes[0].get_title()
    assert "dotted" not in soap_basis.plot(soap_basis.study(moments(build_run))).axes[0].get_title()


def test_factors_without_a_kept_basis_have_fewer_panels(build_run):
    shampoo = soap_basis.study(
        moments(build_run, eigenbasis_off_diagonal=np.nan * SIDES, eigenbasis_information=np.nan, factor_exponent=-0.25)
    )
    assert [ax.get_ylabel() for ax in soap_basis.plot(shampoo).axes] == ["λ_max/λ_min", "tr(L)/λ_max"]
    assert shampoo["exponent"].values.tolist() == [-0.25, -0.25]
    assert "eigenbasis" not in soap_basis.summary(shampoo)


def test_refused_with_the_reason(build_run):
    with pytest.raises(ValueError, match=r"^run: no optimizer in it keeps Kronecker factors \(SOAP and Shampoo do\)"):
        soap_basis.study(moments(build_run, factor_condition=np.nan * SIDES))
