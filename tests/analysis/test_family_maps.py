"""The figure of families: one line and one band each, in one colour, with the numbers of the band."""

import numpy as np
import pytest

from optiscope.analysis.family_maps import GRID, plot
from optiscope.diagnostics.newton_schulz.families import FAMILIES


def test_lines_are_the_map_and_bands_are_where_it_ends():
    names = ("jordan", "aol_nvidia", "root_2048x2048")
    schedules = {name: FAMILIES[name].schedule(FAMILIES[name].steps) for name in names}
    lines, bands = plot(schedules).axes
    curves = [line for line in lines.lines if len(line.get_xdata()) == len(GRID)]
    assert len(curves) == 4  # and where the second is negative
    o = GRID
    for a, b, c in schedules["jordan"]:
        o = a * o + b * o**3 + c * o**5
    assert curves[0].get_ydata() == pytest.approx(o, rel=1e-9)
    negative = GRID[np.isfinite(curves[2].get_ydata())]
    assert negative.min() == pytest.approx(0.8837, abs=0.01)
    assert [text.get_text() for text in bands.texts] == ["[0.682, 1.134]", "[-1.084, 1.084]", "[0.772, 3.314]"]
    assert [label.get_text() for label in bands.get_yticklabels()] == ["jordan, 5 steps", "aol_nvidia, 4 steps", "root_2048x2048, 5 steps"]
    assert bands.lines[0].get_xdata() == pytest.approx([0.682, 1.134], abs=5e-4)
    assert bands.lines[0].get_color() == curves[0].get_color()


def test_a_schedule_without_bounds_is_drawn():
    _, bands = plot({"bad": ((10.0, 10.0, 10.0),) * 9}).axes
    assert bands.texts[0].get_text() == "unbounded"
