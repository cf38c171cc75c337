"""Whether the Newton–Schulz coefficients in force do what they are meant to, told from their scalar maps (`diagnostics.newton_schulz.hazards`)."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...diagnostics.finding import Finding
from ...diagnostics.newton_schulz.families import Coefficients, repeat_last
from ...diagnostics.newton_schulz.hazards import LIFTED, attracting_cycle, escape, negative_intervals, output_band, restart
from ...diagnostics.newton_schulz.nearest_family import known_as_wrong
from ...diagnostics.newton_schulz.spectral_map import gram_residual
from ...diagnostics.newton_schulz.verdict import outside, told
from ..in_parts import windows
from ..run import ns_schedules
from .matrices import count, group, names

# What one further step must take off the residual to be worth anything: bfloat16 alone moves it by 0.015.
WORTH = 0.01


def hazards(run: xr.DataTree) -> Iterator[Finding]:
    """What a schedule in force makes of the singular values up to the largest recorded x = σ_1/‖M‖_F; the first of these that holds:

    it begins anew past the end of its list (`ns_cycled`) or ends (`ns_band`) outside [0.3, 1.5] for x ≥ 0.01; values leave the radius
    from which the next polynomial only enlarges them (`ns_escape`); it turns recorded singular values negative (`ns_sign`).
    """
    geometry = group(run, "geometry")
    for i, schedule in enumerate(ns_schedules(geometry)):
        used = geometry["ns_schedule"].values == i
        if used.any():
            largest = _largest(geometry, used) if schedule.scaling == "frobenius" else np.ones(0)
            yield from _hazard(schedule.coefficients, largest, geometry, used.any(axis=0), "")


def unread_hazards(run: xr.DataTree) -> Iterator[Finding]:
    """The same of triples among the settings of an optimizer whose iteration was not read: a class of the user's own."""
    geometry = group(run, "geometry")
    for entry in run.attrs.get("optimizers", ()):
        own = geometry["optimizer"].values == entry.get("label")
        if not own.any() or (geometry["ns_schedule"].values[:, own] >= 0).any():
            continue
        for settings in entry.get("groups", ()):
            if coefficients := _coefficients_among(settings):
                used = np.broadcast_to(own, geometry["ns_schedule"].shape)
                yield from _hazard(coefficients, _largest(geometry, used), geometry, own, f"{entry['label']} (from its settings): ")


def residual_floor(run: xr.DataTree) -> Iterator[Finding]:
    """From some step on, neither the steps that are taken nor any more of them lower the mean predicted residual by 0.01.

    Jordan's triple does not converge: almost every value ends on a cycle of four, which leaves a residual of 0.376.
    """
    geometry = group(run, "geometry")
    for i, schedule in enumerate(ns_schedules(geometry)):
        used, steps = geometry["ns_schedule"].values == i, len(schedule.coefficients)
        curves = geometry["ns_residual"].variable
        if curves.ndim < 3 or not used.any() or not 0 < steps < curves.shape[-1]:
            continue
        total, number = np.zeros(curves.shape[-1]), 0
        for window in windows(curves):
            own = curves[window].values[used[window]]
            own = own[np.isfinite(own).all(axis=-1)]
            total, number = total + own.sum(axis=0, dtype=np.float64), number + len(own)
        if not number:
            continue
        mean = total / number
        enough = next(k for k in range(len(mean)) if mean[k] - mean[k:].min() < WORTH)
        if not 0 < enough <= steps:
            continue
        concerned = used.any(axis=0)
        text = (
            f"The mean residual of {count(concerned)} is at its floor of {mean[enough]:.3f} after {enough} of {steps} Newton–Schulz steps"
        )
        text += f" ({mean[steps]:.3f} after all)" if enough < steps else ""
        text += f"; up to {len(mean) - 1} steps of these coefficients take off less than {WORTH}."
        numbers = {"step": enough, "steps": steps, "residual_there": mean[enough], "residual": mean[steps], "least": mean.min()}
        cycle = attracting_cycle(schedule.coefficients[-1])
        if len(cycle) > 1:
            limit = float(gram_residual(cycle))
            text += f" They end on a cycle of {len(cycle)} values, which leaves {limit:.3f}."
            numbers["limit"] = limit
        advice = "Save the steps after that" if enough < steps else "Leave the number of steps"
        yield Finding(
            "residual_floor", "info", text, f"{advice}; for a lower residual take coefficients made for the number of steps (diag schedule).",
            names(geometry, concerned), numbers,
        )  # fmt: skip


def _hazard(
    coefficients: Coefficients, largest: NDArray[np.float64], geometry: xr.Dataset, concerned: NDArray[np.bool_], of: str
) -> Iterator[Finding]:
    reach = float(min(largest.max(), 1.0)) if len(largest) else 1.0
    if not coefficients or reach <= LIFTED:
        return
    low, high = output_band(coefficients, (LIFTED, reach))
    numbers = {"lowest": low, "highest": high, "reach": reach}
    known = known_as_wrong(coefficients)
    known = f" This is {known}." if known else ""
    bounded = np.isfinite([low, high]).all()
    band = f"singular values from {LIFTED} to {reach:.2g} of ‖M‖_F {told((low, high))}{', where 1 is meant' if bounded else ''}"
    bad = outside((low, high))
    if bad and (step := restart(coefficients)):
        yield Finding(
            "ns_cycled", "error", f"{of}The list of coefficients begins anew at step {step + 1}, where values are no longer small: {band}.",
            "Past the end of a list repeat its last triple, or take a list made for that many steps.", names(geometry, concerned),
            {**numbers, "step": step + 1},
        )  # fmt: skip
    elif left := escape(coefficients, reach):
        yield Finding(
            "ns_escape", "error",
            f"{of}Singular values reach {left.reached:.5g} after step {left.step}, and beyond {left.bound:.5g} the next steps only enlarge them: {band}.{known}",
            "Divide the coefficients (a, b, c) by (s, s³, s⁵) with s = 1.01 or more, or take another list.", names(geometry, concerned),
            {**numbers, **left._asdict()},
        )  # fmt: skip
    elif negative := negative_intervals(coefficients, reach):
        lowest = negative[0][0]
        reached = largest > lowest
        share = f" in {reached.mean():.0%} of the records" if len(largest) else ""
        yield Finding(
            "ns_sign", "error",
            f"{of}The coefficients turn singular values above {lowest:.4g} of ‖M‖_F negative: the update goes against its leading direction{share}.{known}",
            "Take coefficients whose first polynomial is positive up to 1.", names(geometry, concerned),
            {**numbers, "from": lowest, **({"share": reached.mean()} if len(largest) else {})},
        )  # fmt: skip
    elif bad:
        yield Finding(
            "ns_band", "warning" if bounded else "error", f"{of}The coefficients do not orthogonalise: {band}.{known}",
            "Check the list against its source; a list is made for its own number of steps.", names(geometry, concerned), numbers,
        )  # fmt: skip


def _largest(geometry: xr.Dataset, used: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Largest normalised singular value 1/√(stable rank) of every record chosen."""
    rank = geometry["stable_rank"].values[used].astype(np.float64)
    found: NDArray[np.float64] = 1 / np.sqrt(rank[rank > 0])
    return found


def _coefficients_among(settings: dict[str, Any]) -> Coefficients:
    """The first list of triples in a parameter group, for as many steps as the group says."""
    for value in settings.values():
        rows = [value] if _is_triple(value) else value
        if isinstance(rows, Sequence) and not isinstance(rows, str) and rows and all(map(_is_triple, rows)):
            found: Coefficients = tuple((float(a), float(b), float(c)) for a, b, c in rows)
            steps = next((v for key, v in settings.items() if "steps" in key and type(v) is int and 0 < v < 100), len(found))
            return repeat_last(found, steps)
    return ()


def _is_triple(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 3 and all(isinstance(v, float) for v in value)


RULES = (hazards, unread_hazards, residual_floor)
