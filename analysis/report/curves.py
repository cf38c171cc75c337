"""The two interactive plots of a page: the loss, and the condition number of single matrices."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from bokeh.core.types import ID
from bokeh.embed import json_item
from bokeh.models import BoxZoomTool, HoverTool, PanTool, ResetTool, SaveTool, WheelZoomTool
from bokeh.models.annotations import Legend, LegendItem
from bokeh.plotting import figure as bokeh_figure
from bokeh.resources import Resources
from matplotlib.colors import to_hex

from ...diagnostics.escape import escaped
from ..figures import operator_palette
from ..run import operators_of, records

POINTS = 20_000  # in a plot; where there are more, records are left out evenly
CURVE = 1_000  # of a loss curve
DOTS = 200  # on a curve
SPARSE = 50  # values of a curve up to which each is marked
LABELS = 40  # operators in the legend, and so in the plot
COLOURS = ("#1f77b4", "#d6600a", "#2a7f2a", "#b3261e", "#7a4fb0", "#7a5647", "#c0499c", "#5f6368")


def script() -> str:
    """The plotting library itself, without which nothing would be drawn from a file on disk."""
    return str(Resources(mode="inline", components=["bokeh"]).js_raw[0])


def loss_of(run: xr.DataTree) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of every logged scalar that is named a loss, at most four, the training's first."""
    if "scalars" not in run.children:
        return {}
    scalars = run["scalars"].to_dataset()
    names = sorted((str(n) for n in scalars.data_vars if "loss" in str(n).lower()), key=lambda n: (n not in ("loss", "train_loss"), n))
    found = {}
    for name in names[:4]:
        values = np.asarray(scalars[name].values, dtype=np.float64)
        known = np.flatnonzero(np.isfinite(values))
        if len(known):
            kept = known[_evenly(len(known), CURVE)]
            found[name] = (scalars["step"].values[kept], values[kept])
    return found


def loss_plot(runs: Mapping[str, xr.DataTree], target: str) -> dict[str, Any] | None:
    """The logged losses over steps, a dot where a record was made; of several runs only the first loss of each."""
    plot = _plot("logged loss", log=False)
    items: list[tuple[str, list[Any]]] = []
    hovered = []
    for run_name, run in runs.items():
        losses = loss_of(run)
        for name in list(losses)[: 1 if len(runs) > 1 else None]:
            steps, values = losses[name]
            colour, label = COLOURS[len(items) % len(COLOURS)], run_name if len(runs) > 1 else name
            line = plot.line(
                "x", "y", source={"x": steps, "y": values, "label": [_label(label)] * len(steps)}, line_color=colour, line_width=2
            )
            hovered.append(line)
            items.append((label, [line]))
            marked = np.isin(steps, _record_steps(run)) if name == next(iter(losses)) else np.full(len(steps), len(steps) <= SPARSE)
            if len(at := np.flatnonzero(marked)):
                at = at[_evenly(len(at), DOTS)]
                items[-1][1].append(plot.scatter(steps[at], values[at], size=6, color=colour, line_color="white"))
    if not items:
        return None
    plot.add_tools(HoverTool(renderers=hovered, tooltips=[("", "@label"), ("step", "@x"), ("loss", "@y{0.0000}")], mode="mouse"))
    plot.add_layout(_legend(items), "below")
    return _item(plot, target)


def kappa_plot(run: xr.DataTree, target: str) -> dict[str, Any] | None:
    """κ of every single matrix over the records, coloured by operator."""
    if "geometry" not in run.children or not run["geometry"].sizes.get("step"):
        return None
    geometry = records(run, "geometry")
    kappa = geometry["condition_number"].values
    shown = np.flatnonzero(np.isfinite(kappa).any(axis=0))
    if not len(shown):
        return None
    kept = _evenly(len(kappa), max(POINTS // len(shown), 2))
    steps, kappa = geometry["step"].values[kept], kappa[kept]
    plot = _plot("condition number κ of the NS input", log=True)
    operators = operators_of(geometry.isel(matrix=shown))[:LABELS]
    palette = operator_palette(operators)
    items: list[tuple[str, list[Any]]] = []
    for operator in operators:
        own = [int(j) for j in shown if geometry["operator"].values[j] == operator]
        known = [np.isfinite(kappa[:, j]) for j in own]
        source = {
            "xs": [steps[k].astype(np.int32) for k in known],
            "ys": [kappa[k, j].astype(np.float32) for k, j in zip(known, own, strict=True)],
            "label": [_label(geometry["name"].values[j]) for j in own],
        }
        lines = plot.multi_line("xs", "ys", source=source, line_color=to_hex(palette[operator]), line_width=1.6, line_alpha=0.75,
                                hover_line_alpha=1.0, hover_line_width=3.5, hover_line_color=to_hex(palette[operator]))  # fmt: skip
        items.append((operator, [lines]))
    tooltips = [("", "@label"), ("step", "$snap_x{0}"), ("κ", "$snap_y{0,0.0}")]
    plot.add_tools(HoverTool(tooltips=tooltips, line_policy="nearest", mode="mouse"))
    plot.add_layout(_legend(items), "below")
    return _item(plot, target)


def _plot(y: str, *, log: bool) -> Any:
    # The wheel scrolls the page; with Ctrl it zooms.
    box, wheel = BoxZoomTool(), WheelZoomTool(modifiers={"ctrl": True})
    plot = bokeh_figure(
        height=360, sizing_mode="stretch_width", tools=[box, PanTool(), wheel, ResetTool(), SaveTool()], active_drag=box, active_scroll=wheel, toolbar_location="above",
        x_axis_label="optimizer step", y_axis_label=y, y_axis_type="log" if log else "linear", background_fill_color=None, border_fill_color=None,
        outline_line_color=None,
    )  # fmt: skip
    plot.toolbar.logo = None
    plot.grid.grid_line_color = "#e3e5e8"
    for axis in plot.axis:
        axis.update(axis_label_text_font_style="normal", axis_label_text_color="#333", major_label_text_color="#333", axis_line_color="#888",
                    major_tick_line_color="#888", minor_tick_line_color=None)  # fmt: skip
    return plot


def _legend(drawn: list[tuple[str, list[Any]]]) -> Legend:
    """What each label hides and shows, under the plot in as many columns as a phone has room for."""
    labels = [_label(text, 24) for text, _ in drawn]
    items = [LegendItem(label=label, renderers=renderers) for label, (_, renderers) in zip(labels, drawn, strict=True)]
    columns = max(1, 300 // (7 * max(map(len, labels)) + 36))
    return Legend(items=items, click_policy="hide", ncols=columns, location="left", border_line_color=None, background_fill_color=None,
                  label_text_font_size="12px", label_text_color="#333", spacing=4, margin=4)  # fmt: skip


def _item(plot: Any, target: str) -> dict[str, Any]:
    """The plot as JSON, its ids counted from the start for each plot: the library counts on over all it ever made."""
    ids: dict[str, str] = {}

    def renumbered(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: ids.setdefault(inner, f"{target}-{len(ids)}")
                if key in ("id", "root_id") and isinstance(inner, str)
                else renumbered(inner)
                for key, inner in value.items()
            }
        return [renumbered(inner) for inner in value] if isinstance(value, list) else value

    item: dict[str, Any] = renumbered(dict(json_item(plot, ID(target))))
    return item


def _label(text: object, longest: int = 80) -> str:
    """A text of the run for the plotting library, which would fetch a typesetter for what it takes for a formula."""
    text = re.sub(r"\$(?=\$)|\\(?=[(\[])", r"\g<0> ", escaped(text))
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[1 - longest // 2 :]}"


def _evenly(count: int, most: int) -> np.ndarray:
    """Indices of at most `most` of `count`, the first and the last among them."""
    return np.arange(count) if count <= most else np.unique(np.linspace(0, count - 1, most).round().astype(int))


def _record_steps(run: xr.DataTree) -> np.ndarray:
    return np.asarray(next((run[g]["step"].values for g in ("geometry", "update") if g in run.children and run[g].sizes.get("step")), []))
