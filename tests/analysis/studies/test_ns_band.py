"""The band of the coefficients in force: against the tables of the papers, and the recorded range of singular values by hand."""

import numpy as np
import pytest

from optiscope.analysis import ns_band

NAME = "layers.0.attn.q_proj.weight"
JORDAN = (3.4445, -4.7750, 2.0315)
AOL = ((4.0098, -7.0585, 2.4635), (3.4585, -5.5479, 2.5959), (2.7573, -3.2939, 1.4254), (2.7215, -3.0494, 1.3169))
ROOT = (3.4916, -4.8224, 2.1095)


def one(build_run, schedule):
    return ns_band.study(build_run({NAME: {"sigma": (1.0, 0.1)}}, schedules=(schedule,))).isel(schedule=0)


def test_five_steps_of_jordan(build_run):
    found = one(build_run, (JORDAN,) * 5)
    assert found["schedule"].item() == "5 steps of jordan"
    after = [float(found["output"].sel(x=x, method="nearest")) for x in (1e-1, 1e-3, 1e-4, 1e-6)]
    # The last in the linear regime, 3.4445⁵·10⁻⁶; the third to the three digits of the table.
    assert after == pytest.approx([0.71212, 0.47054, 0.0485, 4.849e-4], rel=2e-3)
    assert float(found["worst"]) == pytest.approx(0.31817, abs=1e-4)
    assert (float(found["band_low"]), float(found["band_high"])) == pytest.approx((0.682, 1.134), abs=1e-3)
    assert float(found["slope"]) == pytest.approx(3.4445**5, rel=1e-12)
    assert np.isnan(found["negative_from"])
    assert float(found["escaped"]) == 0


def test_a_direction_that_is_turned_round(build_run):
    assert float(one(build_run, AOL[:1])["negative_from"]) == pytest.approx(0.8837, abs=1e-4)


@pytest.mark.parametrize(("steps", "share"), [(4, 0.023), (5, 0.037)])
def test_singular_values_that_escape(build_run, steps, share):
    assert float(one(build_run, (ROOT,) * steps)["escaped"]) == pytest.approx(share, abs=1e-3)


def test_the_recorded_range_is_that_of_the_spectra(build_run):
    sigma = [np.array([1.0, 0.5, 1e-3]), np.array([1.0, 0.1, 1e-5]), np.array([1.0, 0.2, 1e-4])]
    found = ns_band.study(build_run({NAME: {"sigma": sigma}})).isel(schedule=0, operator=0)
    x = np.array([s / np.linalg.norm(s) for s in sigma])
    # The stable rank is stored as float32.
    assert float(found["smallest"]) == pytest.approx(np.median(x[:, -1]), rel=1e-6)
    assert float(found["largest"]) == pytest.approx(np.median(x[:, 0]), rel=1e-6)
    assert float(found["least"]) == pytest.approx(x.min(), rel=1e-6)
    assert float(found["unlifted"]) == pytest.approx(1.0)
