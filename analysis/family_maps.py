"""What Newton–Schulz families do to a singular value, drawn: p(x) over six decades, and the band it ends in (cf. arXiv 2505.16932, Fig. 1)."""

from collections.abc import Mapping

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from ..diagnostics.newton_schulz.families import Coefficients
from ..diagnostics.newton_schulz.hazards import LIFTED, output_band
from ..diagnostics.newton_schulz.spectral_map import ns_map
from .figures import axes, finish

GRID = np.geomspace(1e-6, 1, 1201)
SHOWN = (-1.3, 2.3)  # bands beyond end at the edge; their numbers stand beside them


def plot(schedules: Mapping[str, Coefficients]) -> Figure:
    """|p(x)| of schedules by name, dashed thin where p is negative; beside it the output band of x ≥ 0.01, in the colour of its line."""
    figure, (lines, bands) = axes(2, width=6.5, height=max(3.6, 1.4 + 0.24 * len(schedules)))
    colours = sns.color_palette("tab10")
    styles = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))  # a colour comes back in another style
    for i, coefficients in enumerate(schedules.values()):
        output = ns_map(GRID, coefficients)
        output[~np.isfinite(output)] = np.nan
        look = {"color": colours[i % 10], "linestyle": styles[i // 10 % 3]}
        lines.plot(GRID, np.where(output > 0, output, np.nan), linewidth=1.4, **look)
        if (output < 0).any():
            lines.plot(GRID, np.where(output < 0, -output, np.nan), color=look["color"], linestyle="--", linewidth=2.4)
        low, high = output_band(coefficients)
        bands.plot(np.clip([low, high], *SHOWN), [i, i], color=look["color"], linewidth=4, solid_capstyle="butt", marker="|")
        told = f"[{low:.3f}, {high:.3f}]" if np.isfinite([low, high]).all() else "unbounded"
        bands.annotate(told, (1.02, i), xycoords=("axes fraction", "data"), fontsize=8, va="center", annotation_clip=False)
    bands.set_yticks(
        range(len(schedules)), [f"{name}, {len(s)} step{'' if len(s) == 1 else 's'}" for name, s in schedules.items()], fontsize=8
    )
    bands.set_ylim(len(schedules) - 0.4, -0.6)
    bands.set_xlim(*SHOWN)
    bands.axvline(1, color="0.4", linewidth=0.8, zorder=0)
    lines.axhline(1, color="0.4", linewidth=0.8, zorder=0)
    lines.set_xlim(GRID[0], GRID[-1])
    lines.set_ylim(1e-6, 10)
    finish(lines, title="What becomes of a singular value", x="before, x = σ/‖M‖_F", y="after, |p(x)|", log_x=True, log_y=True)
    finish(bands, title=f"Where x from {LIFTED:g} to 1 ends", x="after, p(x); 1 is meant", y="")
    return figure
