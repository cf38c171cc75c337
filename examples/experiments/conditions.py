"""The budgets that are compared: who gets how many Newton–Schulz steps, and on whose say."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import xarray as xr
from torch import nn

from optiscope.analysis import derive_schedule, residual_curves
from optiscope.diagnostics.newton_schulz.polar_express import matched_coefficients
from optiscope.diagnostics.newton_schulz.spectral_map import ns_flops
from optiscope.diagnostics.operators import classify
from optiscope.diagnostics.schedules.allocation import least_mean, problem
from optiscope.diagnostics.schedules.deriving import STEPS
from optiscope.diagnostics.schedules.schedule_file import OperatorSchedule, Schedule
from optiscope.examples.experiments.exact_polar import exact_polar
from optiscope.examples.experiments.training import Treatment, hidden_matrices

BUDGET = 5  # steps for all: the baseline, and in FLOPs what every schedule may cost


def muon(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Muon as in the demo: Jordan's coefficients five times, no weight decay."""
    return torch.optim.Muon(parameters, lr=lr, weight_decay=0.0)


def uniform(steps: int) -> Callable[[nn.Module], Schedule]:
    """The schedule designed for `steps` steps, for every operator."""

    def begin(model: nn.Module) -> Schedule:
        matrices: dict[str, list[str]] = {}
        for name in hidden_matrices(model):
            matrices.setdefault(classify(name), []).append(name)
        shape = {name: tuple(p.shape) for name, p in hidden_matrices(model).items()}
        cost = {operator: steps * sum(ns_flops(*shape[name]) for name in names) for operator, names in matrices.items()}
        nan = float("nan")
        return Schedule(
            {o: OperatorSchedule(matched_coefficients(steps), tuple(names), nan, nan, cost[o]) for o, names in matrices.items()}
        )

    return begin


def permuted(curves: np.ndarray, seed: int) -> list[int]:
    """For every operator, whose curve it gets: a random permutation other than the identity."""
    rng = np.random.default_rng(seed)
    while (order := rng.permutation(len(curves))).tolist() == list(range(len(curves))):
        pass
    return order.tolist()


def reversed_hardness(curves: np.ndarray, seed: int) -> list[int]:
    """For every operator, whose curve it gets: the hardest the easiest's, and so on, hardness being the residual under the baseline."""
    order = np.argsort(curves[:, STEPS.index(BUDGET)], kind="stable")
    result = np.empty(len(curves), np.int64)
    result[order] = order[::-1]
    return result.tolist()


def relabelled(whose: Callable[[np.ndarray, int], Sequence[int]]) -> Callable[[xr.DataTree, slice, int], Schedule]:
    """The default programme (least mean under the cap) on curves that belong to other operators, under the true costs.

    Such curves hold the same values in other rows, so the baseline stays feasible, and the schedule costs no more than it. Where the cap
    leaves nothing but the baseline, which would be no control, it is dropped.
    """

    def commit(run: xr.DataTree, window: slice, seed: int) -> Schedule:
        template = derive_schedule(run, budget=BUDGET, rule="uniform", window=window)
        operators = list(template.operators)
        curves = residual_curves.study(run, window, ("matched",))["residual"].sel(operator=operators).values[0]
        cost = [template.operators[o].cost // BUDGET for o in operators]
        count = [len(template.operators[o].matrices) for o in operators]
        given = problem(curves[list(whose(curves, seed))], STEPS, cost, count, BUDGET)
        found = least_mean(given)
        if set(found.steps) == {BUDGET}:
            found = least_mean(given, capped=False)
        entries = {
            o: replace(
                template.operators[o],
                coefficients=matched_coefficients(k),
                predicted_residual=float(curves[g, STEPS.index(k)]),
                cost=cost[g] * k,
            )
            for g, (o, k) in enumerate(zip(operators, found.steps, strict=True))
        }
        return replace(template, operators=entries, budget={**template.budget, "cost": found.cost}, objective={})

    return commit


def derived(rule: str) -> Callable[[xr.DataTree, slice, int], Schedule]:
    """What `derive_schedule` finds in the window, of whole operators as the controls have them, and in force however uncertain."""
    return lambda run, window, seed: derive_schedule(run, budget=BUDGET, rule=rule, window=window, split="never", keep_uniform=False)


# The first is the baseline.
CONDITIONS: dict[str, Treatment] = {
    "uniform-5": Treatment(muon, uniform(5)),
    "amo": Treatment(muon, uniform(5), derived("mean")),
    "minimax": Treatment(muon, uniform(5), derived("minimax")),
    "permuted": Treatment(muon, uniform(5), relabelled(permuted)),
    "reversed": Treatment(muon, uniform(5), relabelled(reversed_hardness)),
    "uniform-4": Treatment(muon, uniform(4)),
    "uniform-6": Treatment(muon, uniform(6)),
    "jordan-5": Treatment(muon),
    "exact": Treatment(muon, around=exact_polar),
}
