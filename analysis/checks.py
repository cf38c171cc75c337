"""What is wrong with a run: rules over its records, each a sentence with its numbers, its matrices and what to do."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

from ..diagnostics.update_size import READABLE_NOISE
from .run import ns_schedules, records
from .studies import rms_alignment

Severity = Literal["info", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error")

NEAR_EPS = 1e3  # ‖M‖_F/eps under which scale invariance is at risk: X₀ = M/max(‖M‖_F, eps) loses it at 1


@dataclass(frozen=True)
class Finding:
    """One thing to know about a run.

    Attributes:
        rule: name of the rule.
        severity: "info" never fails a check.
        sentence: what was found, numbers included.
        advice: what to do.
        matrices: names of those concerned.
    """

    rule: str
    severity: Severity
    sentence: str
    advice: str
    matrices: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def check(run: xr.DataTree) -> list[Finding]:
    """All findings of a run, the most severe first.

    Raises:
        ValueError: the run has no records.
    """
    recorded = [group for group in ("update", "geometry") if group in run.children and run[group].sizes.get("step")]
    if not recorded:
        raise ValueError("run: no records yet; record at least one step")
    found: list[Finding] = [*_recording_errors(run), *_dropped(run)]
    for group in recorded:
        dataset = records(run, group).load()
        for rule in _RULES[group]:
            found += rule(dataset)
    if "update" in recorded:
        found += _off_target(run)
    return sorted(found, key=lambda finding: -SEVERITIES.index(finding.severity))


def _recording_errors(run: xr.DataTree) -> Iterator[Finding]:
    if errors := run.attrs.get("errors", 0):
        yield Finding(
            "recording_errors",
            "warning",
            f"Measuring failed {errors} time{'' if errors == 1 else 's'}; what failed is missing.",
            "See the training's log for the first failure.",
        )


def _dropped(run: xr.DataTree) -> Iterator[Finding]:
    if dropped := run.attrs.get("dropped", 0):
        yield Finding(
            "dropped",
            "warning",
            f"{dropped} record{'' if dropped == 1 else 's'} lost because the store could not be written for long.",
            "Make room, or record elsewhere.",
        )


def _off_target(run: xr.DataTree) -> Iterator[Finding]:
    study = rms_alignment.study(run)
    known = np.isfinite(study["residual"].values)
    # A single record may be an outlier; half of a matrix's records are a scaling.
    share = study["off_target"].values.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    rms: dict[str, float] = {}
    off_target = set()
    for optimizer in map(str, np.unique(study["optimizer"].values)):
        rms[optimizer] = float(study["to_adamw"].where((study["optimizer"] == optimizer) & (study["to_adamw"] > 0)).median())
        own = (study["optimizer"].values == optimizer) & (share > 0.5)
        if own.any():
            off_target.add(optimizer)
            factor = float(np.nanmedian(study["alignment"].values[:, own]))
            yield Finding(
                "rms_off_target", "error",
                f"{optimizer}: the updates of {_count(own)} are {factor:.3g} times their target size, outside what their residual explains.",
                "Look for a scaling that is missing or applied twice: 0.2, √max(rows, cols), √(rows/cols).", _names(study, own),
            )  # fmt: skip
    orthogonal = {str(o) for o in study["optimizer"].values[known.any(axis=0)]}
    for optimizer in sorted(orthogonal - off_target):
        if (rms[optimizer] <= 0.7 or rms[optimizer] >= 1.5) and len(rms) > len(orthogonal):
            yield Finding(
                "rms_not_matched", "info",
                f"{optimizer}: update RMS per learning rate is {rms[optimizer]:.2f} of AdamW's usual 0.2, so its learning rate is on another scale.",
                "To share a learning rate with AdamW, use adjust_lr_fn='match_rms_adamw'.",
            )  # fmt: skip


def _not_finite(update: xr.Dataset) -> Iterator[Finding]:
    recorded = np.isfinite(update["lr"].values)
    bad = recorded & ~(np.isfinite(update["update_rms"].values) & np.isfinite(update["grad_rms"].values))
    if bad.any():
        steps = update["step"].values[bad.any(axis=1)]
        yield Finding(
            "not_finite", "error", f"NaN or infinity in the gradient or the update of {_count(bad.any(axis=0))}, first at step {steps[0]}.",
            "Find the first step with a non-finite loss; lower the learning rate or clip gradients.", _names(update, bad.any(axis=0)),
        )  # fmt: skip


def _dead(update: xr.Dataset) -> Iterator[Finding]:
    recorded = np.isfinite(update["update_rms"].values)
    dead = recorded.any(axis=0) & ~((update["update_rms"].values != 0) & recorded).any(axis=0)
    if dead.any():
        yield Finding(
            "dead", "warning", f"{_count(dead)} did not move in any record.",
            "Check that they take part in the loss, and that the learning rate is not zero.", _names(update, dead),
        )  # fmt: skip


def _changed_outside(update: xr.Dataset) -> Iterator[Finding]:
    if "changed_outside" not in update:
        return
    changed = update["changed_outside"].values == 1
    if changed.any():
        steps = update["step"].values[changed.any(axis=1)]
        yield Finding(
            "changed_outside", "info",
            f"Weights of {_count(changed.any(axis=0))} changed between the optimizer's steps, first before step {steps[0]} (a clip, a swap with an average, a load).",
            "Nothing, if that is meant; updates are recorded as the optimizer's steps make them.", _names(update, changed.any(axis=0)),
        )  # fmt: skip


def _noisy(update: xr.Dataset) -> Iterator[Finding]:
    noise = update["update_noise"].where(np.isfinite(update["update_noise"])).median("step").values
    noisy = noise > READABLE_NOISE
    if noisy.any():
        yield Finding(
            "update_rounded", "warning",
            f"Weights of {_count(noisy)} are stored so coarsely that rounding noise is up to {np.nanmax(noise):.0%} of an update as read back.",
            "Keep float32 master weights; sizes, achieved residual and alignment cannot be read back from these weights.", _names(update, noisy),
        )  # fmt: skip


def _single_row(geometry: xr.Dataset) -> Iterator[Finding]:
    single = np.minimum(geometry["rows"].values, geometry["cols"].values) == 1
    if single.any():
        yield Finding(
            "single_row", "info", f"{_count(single)} with a single row or column: one singular value, κ = 1 by definition.",
            "Leave them to AdamW; orthogonalising a vector only normalises it.", _names(geometry, single),
        )  # fmt: skip


def _zero_input(geometry: xr.Dataset) -> Iterator[Finding]:
    zero = (geometry["fro_norm"].values == 0).any(axis=0)
    if zero.any():
        yield Finding(
            "zero_input", "warning", f"The NS input (or momentum) of {_count(zero)} was all zeros in some record; it has no spectrum.",
            "Check that these matrices receive gradients.", _names(geometry, zero),
        )  # fmt: skip


def _bounded(geometry: xr.Dataset) -> Iterator[Finding]:
    recorded = np.isfinite(geometry["condition_number"].values)
    floors = geometry["condition_is_floor"].values & recorded
    if floors.any():
        yield Finding(
            "condition_bounded", "info",
            f"In {floors.sum() / recorded.sum():.0%} of the snapshots κ is only known to be at least the recorded value: the smallest "
            "singular value lies under the rounding noise of the input.",
            "Nothing, unless it persists after the first steps; then the matrix is rank-deficient.", _names(geometry, floors.any(axis=0)),
        )  # fmt: skip


def _near_eps(geometry: xr.Dataset) -> Iterator[Finding]:
    for i, schedule in enumerate(ns_schedules(geometry)):
        if schedule.scaling != "frobenius":
            continue  # its eps bounds something else than ‖M‖_F
        ratio = geometry["fro_norm"].where(geometry["ns_schedule"] == i).values / schedule.eps if schedule.eps else np.array([np.inf])
        small = (ratio > 0) & (ratio < NEAR_EPS)
        if small.any():
            yield Finding(
                "norm_near_eps", "warning", f"‖M‖_F falls to {ratio[small].min():.3g} times the optimizer's eps ({schedule.eps:g}); below eps the update shrinks with it.",
                "Lower eps (1e-15 is safe in float32), or scale the loss.", _names(geometry, small.any(axis=0)),
            )  # fmt: skip


def _no_steps(geometry: xr.Dataset) -> Iterator[Finding]:
    for i, schedule in enumerate(ns_schedules(geometry)):
        own = np.asarray((geometry["ns_schedule"].values == i).any(axis=0))
        if not schedule.coefficients and own.any():
            yield Finding(
                "no_ns_steps", "error", f"{_count(own)} not orthogonalised: zero Newton–Schulz steps.",
                "Set ns_steps to at least 3.", _names(geometry, own),
            )  # fmt: skip


_RULES: dict[str, tuple[Callable[[xr.Dataset], Iterator[Finding]], ...]] = {
    "update": (_not_finite, _dead, _noisy, _changed_outside),
    "geometry": (_no_steps, _near_eps, _zero_input, _single_row, _bounded),
}


def _count(chosen: ArrayLike) -> str:
    number = int(np.sum(chosen))
    return "1 matrix" if number == 1 else f"{number} matrices"


def _names(dataset: xr.Dataset, chosen: ArrayLike) -> tuple[str, ...]:
    return tuple(str(name) for name in dataset["name"].values[np.asarray(chosen)])
