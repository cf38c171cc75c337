"""The course of a training as it was logged: its loss, smoothed, over steps, tokens and wall time, and when it reached a value."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from ..diagnostics.store.run_error import RunError

Floats = NDArray[np.float64]

# Under which names trainers log what is wanted, in order of preference; a slash was stored as a dot.
TRAINING_LOSS = ("loss", "train.loss", "train_loss", "training_loss", "loss_step", "train.loss_step", "train_loss_step", "loss_epoch")
VALIDATION_LOSS = ("validation_loss", "val_loss", "val.loss", "eval_loss", "eval.loss", "valid_loss", "validation.loss", "test_loss")
# What a part of a name says of numbers that are not of the training data.
HELD_OUT = {"val", "valid", "validation", "eval", "evaluation", "test", "dev"}
TOKENS = ("tokens", "tokens_seen", "num_input_tokens_seen", "num_tokens")

TIME_CONSTANTS = (10.0, 0.02)  # of the smoothing: so many steps, or that share of the training's, whichever is longer
UNITS = {"steps": "optimizer steps", "tokens": "tokens", "seconds": "wall time (s)"}
NOT_REACHED = dict.fromkeys(UNITS, float("nan"))


def training_curve(run: xr.DataTree, time_constant: float | None = None) -> xr.Dataset:
    """The logged training loss, one row per step that has one.

    Variables along `step`: `loss`; `ema`, smoothed as in :func:`ema`; `steps`; `tokens`, as logged or from
    `about["tokens_per_step"]`; `seconds` of wall time, the recorder's own included, missing where unknown. Attributes: `loss_name`,
    `time_constant` in steps.

    Args:
        run: as from `open_run`.
        time_constant: of the smoothing, in steps; by default 2 % of the training's and at least 10.

    Raises:
        ValueError: no training loss among the run's scalars.
    """
    scalars = _scalars(run)
    name = logged_as(scalars, TRAINING_LOSS) or _named_a_loss(scalars, held_out=False)
    if name is None:
        raise RunError(f"no training loss among its scalars ({_listed(scalars)}); log it with recorder.log(loss=…)")
    there = scalars.isel(step=np.isfinite(scalars[name].values))
    step = there["step"].values.astype(np.float64)
    constant = max(TIME_CONSTANTS[0], TIME_CONSTANTS[1] * float(step[-1])) if time_constant is None else time_constant
    loss = there[name].values
    return xr.Dataset(
        {
            "loss": ("step", loss),
            "ema": ("step", ema(loss, step, constant)),
            "steps": ("step", step),
            "tokens": ("step", _tokens(run, there, step)),
            "seconds": ("step", _seconds(scalars, step)),
        },
        coords={"step": there["step"].values},
        attrs={"loss_name": name, "time_constant": constant},
    )


def ema(values: ArrayLike, steps: ArrayLike, time_constant: float) -> Floats:
    """Exponential moving average with bias correction, over unevenly spaced steps.

    m_t = d_t m_{t−1} + (1 − d_t) l_t with d_t = e^{−Δstep/T}, divided by the same average of ones: the weighted mean of what was
    logged, so that no value of before the first one enters.

    >>> ema([2.0, 4.0], [1, 2], 1 / np.log(2)).round(4).tolist()
    [2.0, 3.3333]
    """
    values, steps = np.asarray(values, np.float64), np.asarray(steps, np.float64)
    decay = np.exp(-np.diff(steps, prepend=steps[:1] - 1) / time_constant)
    average, total, result = 0.0, 0.0, np.empty(len(values))
    for i, (value, d) in enumerate(zip(values.tolist(), decay.tolist(), strict=True)):
        average, total = d * average + (1 - d) * value, d * total + (1 - d)
        result[i] = average / total
    return result


def first_reach(curve: xr.Dataset, target: float) -> dict[str, float]:
    """Steps, tokens and seconds at which the smoothed loss first is at `target` or under it; NaN where it never is, or unknown.

    Between two logged values the smoothed loss and the three scales are taken as linear.
    """
    smoothed = curve["ema"].values
    under = smoothed <= target
    if not under.any():
        return dict(NOT_REACHED)
    i = int(under.argmax())
    before = max(i - 1, 0)
    share = 1.0 if i == before else float((smoothed[before] - target) / (smoothed[before] - smoothed[i]))
    return {unit: float(curve[unit][before] + share * (curve[unit][i] - curve[unit][before])) for unit in UNITS}


def saved(reached: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
    """1 − (what it took)/(what the reference took to reach the same), by unit: negative where it took more, NaN where one is not known."""
    return {unit: 1 - reached[unit] / reference[unit] if reference[unit] > 0 else float("nan") for unit in UNITS}


def spent(curve: xr.Dataset) -> dict[str, float]:
    """Steps, tokens and seconds at the last logged loss."""
    return {unit: float(curve[unit][-1]) for unit in UNITS}


def validation_loss(run: xr.DataTree) -> tuple[NDArray[np.int64], Floats]:
    """Steps and values of the validation loss, empty where none was logged."""
    scalars = _scalars(run)
    name = logged_as(scalars, VALIDATION_LOSS) or _named_a_loss(scalars, held_out=True)
    if name is None:
        return np.empty(0, np.int64), np.empty(0)
    there = np.isfinite(scalars[name].values)
    return scalars["step"].values[there], scalars[name].values[there]


def logged_as(scalars: xr.Dataset, names: tuple[str, ...]) -> str | None:
    """The first of `names` that was logged and is finite somewhere."""
    return next((name for name in names if name in scalars and np.isfinite(scalars[name].values).any()), None)


def _named_a_loss(scalars: xr.Dataset, *, held_out: bool) -> str | None:
    """Of the names in no table the shortest whose last part is `loss` (`model.loss`), or that is `loss` of a part of the data (`Loss.train`)."""
    found = []
    for name in map(str, scalars.data_vars):
        *before, last = name.lower().split(".")
        is_loss = last == "loss" or (before == ["loss"] and last in HELD_OUT | {"train", "training"})
        if is_loss and held_out != HELD_OUT.isdisjoint((*before, last)):
            found.append(name)
    return logged_as(scalars, tuple(sorted(found, key=lambda name: (name.count("."), name))))


def stated(run: xr.DataTree) -> Mapping[str, Any]:
    """What the user stated about the run; where it was continued, what was stated last."""
    continued = [entry["about"] for entry in run.attrs.get("continued", []) if "about" in entry]
    return {**run.attrs.get("about", {}), **(continued[-1] if continued else {})}


def _scalars(run: xr.DataTree) -> xr.Dataset:
    if "scalars" not in run.children or not run["scalars"].sizes.get("step"):
        raise RunError("no scalars in it, so no loss; log it with recorder.log(loss=…)")
    return run["scalars"].to_dataset().load()


def _listed(scalars: xr.Dataset) -> str:
    names = [str(name) for name in scalars.data_vars]
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "")


def _tokens(run: xr.DataTree, scalars: xr.Dataset, step: Floats) -> Floats:
    name = logged_as(scalars, TOKENS)
    per_step = stated(run).get("tokens_per_step")
    if name is not None:
        known = np.isfinite(scalars[name].values)
        return np.asarray(np.interp(step, step[known], scalars[name].values[known]))
    if isinstance(per_step, (int, float)) and not isinstance(per_step, bool) and per_step > 0:
        return step * per_step
    return np.full(len(step), np.nan)


def _seconds(scalars: xr.Dataset, step: Floats) -> Floats:
    """Wall time from the recorder's clock, which begins anew where a run was continued."""
    if "elapsed_seconds" not in scalars:
        return np.full(len(step), np.nan)
    known = np.isfinite(scalars["elapsed_seconds"].values)
    if not known.any():
        return np.full(len(step), np.nan)
    clock, at = scalars["elapsed_seconds"].values[known], scalars["step"].values[known].astype(np.float64)
    passed = np.diff(clock, prepend=0.0)
    return np.asarray(np.interp(step, at, np.cumsum(np.where(passed < 0, clock, passed))))
