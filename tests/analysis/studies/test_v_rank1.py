"""Information and error of the rank-1 form per operator, and the maps of the matrix that loses most."""

import numpy as np
import pytest

from optiscope.analysis import v_rank1

NAMES = [f"layers.{layer}.{part}.weight" for layer in range(3) for part in ("attn.q_proj", "mlp.up_proj")]


def moments(build_run, *, maps=None, **quantities):
    matrices = {name: {"sigma": np.ones(4), "shape": (4, 20) if "up" in name else (4, 4), "optimizer": "AdamW"} for name in NAMES}
    base = {"rank1_information": 0.5, "rank1_log_error": 0.2, "rank1_log_error_max": 1.0}
    groups = {"second_moment": {**base, **quantities}} | ({"second_moment_map": maps} if maps else {})
    return build_run(matrices, groups=groups)


def test_medians_limits_and_largest_errors(build_run):
    information = np.tile([0.1, 1.0, 0.2, 1.1, 0.6, 1.2], (3, 1))
    largest = np.ones((3, 6))
    largest[1, 2] = 3.0
    largest[:, 1] = np.nan
    found = v_rank1.study(moments(build_run, rank1_information=information, rank1_log_error_max=largest))
    np.testing.assert_allclose(found["information"], np.tile([0.2, 1.1], (3, 1)), rtol=1e-6)
    np.testing.assert_allclose(found["limit"], [np.log(4)] * 2)
    np.testing.assert_array_equal(found["largest_error"], [3, 1])
    assert "map" not in found
    text = v_rank1.summary(found)
    assert text.startswith(
        f"A rank-1 second moment loses most in mlp_up (1.1 nat, {1.1 / np.log(4):.0%} of what is possible) and least in attn_q (0.2)"
    )


def test_the_maps_are_of_the_worst_matrix_that_has_them_at_its_last_record(build_run):
    error = np.tile([0.1, 0.9, 0.2, 0.5, 0.3, 0.4], (3, 1))
    tiles, rank1 = np.full((3, 6, 256), np.nan), np.full((3, 6, 256), np.nan)
    # mlp_up of layer 0 has no map; layer 1's, 4×16 tiles, has none at the last record.
    tiles[:2, 3, :64] = np.arange(64)
    tiles[0, 3, :64] = -1
    rank1[:2, 3, :64] = np.arange(64) + 0.5
    tiles[:, 0, :16] = rank1[:, 0, :16] = 7
    found = v_rank1.study(moments(build_run, rank1_log_error=error, maps={"second_moment_map": tiles, "rank1_map": rank1}))
    assert (found.attrs["matrix"], found.attrs["map_step"]) == (NAMES[3], 20)
    np.testing.assert_array_equal(found["map"], np.arange(64).reshape(4, 16))
    np.testing.assert_array_equal(found["rank1_map"], np.arange(64).reshape(4, 16) + 0.5)
    figure = v_rank1.plot(found)
    shown = [image.get_array() for ax in figure.axes[2:4] for image in ax.images]
    np.testing.assert_array_equal(shown[0], found["map"])
    # One scale for both, else they could not be compared.
    assert {tuple(image.get_clim()) for ax in figure.axes[2:4] for image in ax.images} == {(0.0, 63.5)}


def test_a_map_group_without_maps_is_as_none(build_run):
    assert "map" not in v_rank1.study(moments(build_run, maps={"second_moment_map": np.nan}))


def test_runs_without_a_full_second_moment_are_refused_with_the_reason(build_run):
    with pytest.raises(ValueError, match=r"^run: no optimizer in it keeps a second moment of every coordinate \(Adam does\)"):
        v_rank1.study(moments(build_run, rank1_information=np.nan))
    with pytest.raises(ValueError, match=r"attach with measure=\(…, 'second_moment'\)$"):
        v_rank1.study(build_run({NAMES[0]: {"sigma": (2.0, 1.0)}}))
