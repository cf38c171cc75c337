"""The catalogue: complete, consistent, and honest about what a stored array holds."""

import numpy as np
import pytest

import optiscope.diagnostics
from optiscope.diagnostics.catalogue import EXTRA_COORDINATES, EXTRA_DIMENSIONS, GROUPS, LEVELS, NS_STEPS, QUANTITIES, in_group
from optiscope.diagnostics.spectra.spectrum_sketch import POINTS

# Names that runs already written, and their readers, rely on.
RELIED_ON = {
    "geometry": """sigma_quantile fro_norm condition_number condition_is_floor stable_rank
                   ns_residual ns_residual_polar ns_residual_achieved alignment""",
    "update": "update_rms update_rms_per_lr weight_rms grad_rms momentum_rms update_to_weight lr weight_decay",
}


@pytest.mark.parametrize("group", RELIED_ON)
def test_names_that_others_rely_on_are_there(group):
    assert set(RELIED_ON[group].split()) <= {quantity.name for quantity in in_group(group)}


def test_every_quantity_is_fully_described():
    for quantity in QUANTITIES:
        for text in (quantity.name, quantity.units, quantity.long_name, quantity.definition):
            assert text, quantity.name
            assert text == text.strip(), quantity.name
        assert quantity.name.isidentifier()
        assert quantity.name == quantity.name.lower()


def test_names_and_long_names_are_unique():
    assert len({quantity.name for quantity in QUANTITIES}) == len(QUANTITIES)
    assert len({quantity.long_name for quantity in QUANTITIES}) == len(QUANTITIES)


def test_groups_share_out_the_quantities_in_order():
    assert tuple(quantity for group in GROUPS for quantity in in_group(group)) == QUANTITIES
    assert in_group("nothing") == ()


def test_dimensions_are_known_and_have_their_sizes():
    assert (
        {name: EXTRA_DIMENSIONS[name] for name in ("quantile", "ns_step")}
        == {"quantile": POINTS, "ns_step": NS_STEPS + 1}
        == {"quantile": 64, "ns_step": 11}
    )
    assert {name: len(values) for name, values in EXTRA_COORDINATES.items()}.items() <= EXTRA_DIMENSIONS.items()
    assert list(LEVELS) == sorted(LEVELS)
    assert [1 - level for level in reversed(LEVELS)] == pytest.approx(LEVELS)
    assert {quantity.extra for quantity in QUANTITIES} == {None, *EXTRA_DIMENSIONS}


def test_types_can_hold_what_they_must():
    types = {quantity.name: np.dtype(quantity.dtype) for quantity in QUANTITIES}
    assert types["condition_is_floor"].kind == "b"
    # −1 says that the optimizer does not orthogonalise.
    assert np.issubdtype(types["ns_schedule"], np.signedinteger)
    # float32 ends at 1e-38 and 3e38: a Frobenius norm or an RMS of gradients may lie beyond, and κ carries 1e-4 only in a wide type.
    assert {name for name, kind in types.items() if kind == np.float64} >= {"fro_norm", "grad_rms", "condition_number", "lr"}


def test_every_number_has_a_unit():
    units = {quantity.name: quantity.units for quantity in QUANTITIES}
    assert set(units.values()) == {
        "1",
        "gradient units",
        "gradient units²",
        "parameter units",
        "nat",
        "decade",
        "gradient units/parameter unit",
    }
    assert {name for name, unit in units.items() if unit == "parameter units"} == {"update_rms", "update_norm", "weight_rms"}
    assert {name for name, unit in units.items() if unit == "gradient units"} >= {"fro_norm", "grad_rms", "momentum_rms"}


def test_the_public_surface_is_sorted_and_complete():
    public = optiscope.diagnostics.__all__
    # Constants, then classes, then functions, each in alphabetical order.
    kinds = [0 if name.isupper() else 1 if name[0].isupper() else 2 for name in public]
    assert list(public) == [name for _, name in sorted(zip(kinds, public, strict=True))]
    assert all(hasattr(optiscope.diagnostics, name) for name in public)
