"""The budgets that are compared: what they cost, whose curves they follow, and when they act."""

from itertools import product

import numpy as np
import pytest
import torch

from optiscope.analysis import derive_schedule, open_run
from optiscope.diagnostics.newton_schulz.polar_express import matched_coefficients
from optiscope.examples.byte_llama import SHORT, ByteLlama
from optiscope.examples.experiments.conditions import permuted, relabelled, reversed_hardness, uniform
from optiscope.examples.experiments.training import FULL, hidden_matrices

# Square and wide in turn, six operators.
NAMES = [f"layers.{layer}.{name}_proj" for layer in (0, 1) for name in ("attn.q", "mlp.up", "attn.k", "mlp.gate", "attn.v", "mlp.down")]
WINDOW = slice(4, 12)


@pytest.fixture(scope="module")
def run(record, tmp_path_factory):
    return open_run(record(tmp_path_factory.mktemp("six") / "run.zarr", names=NAMES))


def flops(rows, cols):
    """Two products of (r, q) and (q, r) or (r, r) and (r, q), one of (r, r): 2·n·m·k each."""
    r, q = sorted((rows, cols))
    return 2 * r * q * r + 2 * r * r * r + 2 * r * r * q


def curves(run):
    """R_g(k) from the stored spectra (all of them are stored at this size), and FLOPs of a step, by operator."""
    geometry = run["geometry"].to_dataset().sel(step=WINDOW).load()
    found, cost = {}, {}
    for operator in dict.fromkeys(geometry["operator"].values.tolist()):
        own = geometry.isel(
            matrix=np.flatnonzero((geometry["operator"] == operator).values & (geometry["ns_schedule"] >= 0).all("step").values)
        )
        if not own.sizes["matrix"]:
            continue
        # All six of each are stored, repeated to fill; the first of equal ones.
        levels = own["quantile_level"].values[0]
        x = own["sigma_quantile"].values.astype(np.float64)[..., np.unique(levels, return_index=True)[1]]
        assert x.shape[-1] == 6
        rows = []
        for k in range(3, 9):
            o = x
            for a, b, c in matched_coefficients(k):
                o = a * o + b * o**3 + c * o**5
            rows.append(np.sqrt(((1 - o * o) ** 2).mean(axis=-1)).mean())
        found[operator] = np.array(rows)
        cost[operator] = sum(flops(int(m), int(n)) for m, n in zip(own["rows"], own["cols"], strict=True))
    return found, cost


def best(given, cost, budget, cap):
    """Every choice of 3 to 8 steps, tried."""
    tried = np.array(list(product(range(6), repeat=len(cost))))
    total = sum(given[g][tried[:, g]] for g in range(len(cost)))
    allowed = (tried + 3) @ np.array(cost) <= budget
    if cap is not None:
        allowed &= np.all([given[g][tried[:, g]] <= cap + 1e-9 for g in range(len(cost))], axis=0)
    return np.where(allowed, total, np.inf).min()


@pytest.mark.parametrize("whose", [permuted, reversed_hardness])
@pytest.mark.parametrize("seed", range(4))
def test_relabelled_budgets_are_the_best_for_wrong_curves_within_the_true_flops(run, whose, seed):
    right, cost = curves(run)
    schedule = relabelled(whose)(run, WINDOW, seed)
    operators = list(schedule.operators)
    assert sorted(operators) == sorted(right)
    budget = 5 * sum(cost.values())
    spent = {o: len(entry.coefficients) * cost[o] for o, entry in schedule.operators.items()}
    assert sum(spent.values()) == schedule.budget["cost"] == sum(entry.cost for entry in schedule.operators.values())
    assert sum(spent.values()) <= budget == schedule.budget["limit"]
    order = whose(np.array([right[o] for o in operators]), seed)
    wrong = [right[operators[i]] for i in order]
    reached = sum(wrong[g][schedule.operators[o].steps - 3] for g, o in enumerate(operators))
    costs = [cost[o] for o in operators]
    least = best(wrong, costs, budget, max(curve[2] for curve in right.values()))
    if np.isclose(least, sum(curve[2] for curve in right.values())):  # nothing but five for all under the cap
        least = best(wrong, costs, budget, None)
    assert reached == pytest.approx(least, abs=1e-5)  # spectra are stored as float32; seen: 1e-8
    for o, entry in schedule.operators.items():
        assert entry.coefficients == matched_coefficients(entry.steps)
        assert entry.predicted_residual == pytest.approx(right[o][entry.steps - 3], abs=1e-5)


def test_permutations_differ_by_seed_and_are_never_the_true_order():
    found = {tuple(permuted(np.zeros((3, 6)), seed)) for seed in range(40)}
    # All five of the six orders of three.
    assert found == {(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)}


def test_reversed_hardness_gives_the_hardest_the_easiest_curve():
    residual = np.zeros((4, 6))
    residual[:, 2] = [0.3, 0.9, 0.1, 0.5]  # after five steps
    assert reversed_hardness(residual, 0) == [3, 2, 1, 0]


@pytest.mark.parametrize("steps", [4, 5, 6])
def test_equal_steps_cover_every_hidden_matrix_at_their_cost(steps):
    model = ByteLlama(SHORT)
    schedule = uniform(steps)(model)
    hidden = hidden_matrices(model)
    assert sorted(name for entry in schedule.operators.values() for name in entry.matrices) == sorted(hidden)
    assert sum(entry.cost for entry in schedule.operators.values()) == steps * sum(flops(*p.shape) for p in hidden.values())
    assert {entry.coefficients for entry in schedule.operators.values()} == {matched_coefficients(steps)}


def test_equal_steps_are_what_derive_schedule_calls_uniform(run):
    derived = derive_schedule(run, rule="uniform", window=WINDOW)
    assert {entry.coefficients for entry in derived.operators.values()} == {matched_coefficients(5)}


def test_the_two_architectures_differ_in_which_operators_are_square():
    square = {}
    for name, config in FULL.models.items():
        with torch.device("meta"):
            model = ByteLlama(config)
        square[name] = {parameter.split(".")[-2] for parameter, p in hidden_matrices(model).items() if p.shape[0] == p.shape[1]}
    assert square == {"demo": {"q_proj", "o_proj"}, "square-kv": {"k_proj", "v_proj"}}
