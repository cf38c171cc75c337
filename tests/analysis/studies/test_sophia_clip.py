"""Win rate against the target band, and the share of coordinates without positive curvature."""

import numpy as np
import pytest

from optiscope.analysis import sophia_clip

NAMES = [f"layers.{layer}.{part}.weight" for layer in range(4) for part in ("attn.q_proj", "mlp.up_proj")]


def moments(build_run, rate, share=0.1):
    matrices = {name: {"sigma": (2.0, 1.0), "optimizer": "SophiaG"} for name in NAMES}
    return build_run(matrices, groups={"second_moment": {"sophia_win_rate": rate, "sophia_nonpositive_share": share}})


def test_records_in_below_and_above_the_band(build_run):
    rate = np.full((3, 8), 0.3)
    rate[0, :4], rate[1, :2], rate[2, 7] = 0.05, 0.9, np.nan
    found = sophia_clip.study(moments(build_run, rate))
    assert float(found["below"]) == pytest.approx(4 / 23)
    assert float(found["above"]) == pytest.approx(2 / 23)
    per_matrix = [np.nanmean(rate[:, j]) for j in range(8)]
    assert float(found["mean_win_rate"]) == pytest.approx(np.mean(per_matrix), rel=1e-6)
    assert float(found["mean_win_rate_low"]) < float(found["mean_win_rate"]) < float(found["mean_win_rate_high"])
    assert "74% of the records lie in the target band 0.1–0.5, 17% below and 9% above." in sophia_clip.summary(found)


@pytest.mark.parametrize(("rate", "word"), [(0.02, "small"), (0.8, "large"), (0.3, None)])
def test_the_sentence_says_which_way_gamma_is_off(build_run, rate, word):
    text = sophia_clip.summary(sophia_clip.study(moments(build_run, rate)))
    assert ("γ is too" in text) == (word is not None)
    if word:
        assert f"γ is too {word}. h ≤ 0 in 10.0%" in text


def test_edges_of_the_band_are_in_it(build_run):
    found = sophia_clip.study(moments(build_run, np.tile([0.1, 0.5], (3, 4))))
    assert (float(found["below"]), float(found["above"])) == (0, 0)


def test_refused_with_the_reason(build_run):
    with pytest.raises(ValueError, match=r"^run: no optimizer in it keeps a Hessian estimate and clips by it \(Sophia does\)"):
        sophia_clip.study(moments(build_run, np.nan))
