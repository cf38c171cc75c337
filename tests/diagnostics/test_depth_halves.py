"""Which operators are cut in two by depth, by variances worked out by hand, and where a parameter's layer falls."""

import numpy as np
import pytest

from optiscope.diagnostics.schedules.depth_halves import depth_halves, entry_for
from optiscope.diagnostics.schedules.schedule_file import OperatorSchedule, Schedule


def of(values):
    """Arguments from operator → {layer: log κ}."""
    rows = [(operator, layer, value) for operator, layers in values.items() for layer, value in layers.items()]
    operator, layer, kappa = zip(*rows, strict=True)
    return np.array(operator), np.array(layer), np.array(kappa, float)


# Means 2, 3 and 4 of the operators: a sample variance of 1. Halves of attn_v: 1.5 and 4.5, a variance of 4.5; of mlp_up: 3.5 and 4.5, 0.5.
LAYERED = {
    "attn_q": dict.fromkeys(range(4), 2),
    "attn_v": {0: 1, 1: 2, 2: 4, 3: 5},
    "mlp_up": {0: 3, 1: 4, 2: 4, 3: 5},
}


def test_an_operator_is_cut_where_its_halves_differ_more_than_operators():
    operator, layer, kappa = of(LAYERED)
    members, tested = depth_halves(operator, layer, kappa)
    assert list(members) == ["attn_q", "attn_v:0-1", "attn_v:2-3", "mlp_up"]
    assert members["attn_v:2-3"].tolist() == [False] * 6 + [True] * 2 + [False] * 4
    assert np.sum(list(members.values()), axis=0).tolist() == [1] * 12
    assert tested == {
        "attn_q": {"between_halves": 0.0, "between_operators": 1.0},
        "attn_v": {"between_halves": 4.5, "between_operators": 1.0},
        "mlp_up": {"between_halves": 0.5, "between_operators": 1.0},
    }
    # The same to the float when nothing is to be cut.
    whole, again = depth_halves(operator, layer, kappa, cut=False)
    assert list(whole) == ["attn_q", "attn_v", "mlp_up"]
    assert again == tested


def test_the_middle_layer_of_an_odd_number_belongs_to_the_first_half():
    members, _ = depth_halves(*of({"attn_q": dict(zip((0, 2, 4, 6, 8), (1, 1, 1, 3, 3), strict=True))}))
    assert {name: own.tolist() for name, own in members.items()} == {
        "attn_q:0-4": [True, True, True, False, False],
        "attn_q:6-8": [False, False, False, True, True],
    }


@pytest.mark.parametrize("layers", [(0, 1, 2), (-1, 0, 1, 2, 3), (-1,)])
def test_few_layers_and_matrices_outside_of_them_are_not_tested(layers):
    values = {layer: float(layer) for layer in layers}
    members, tested = depth_halves(*of({"attn_q": values, "mlp_up": values}))
    assert list(members) == ["attn_q", "mlp_up"]
    assert tested == {}


def test_chance_alone_seldom_cuts_an_operator():
    """Log κ of one distribution in all operators and layers: both variances are of means, of 14 and of 28 values, over 2 and over 7.

    Their ratio is 2·F(1, 6), which exceeds 1 in 50 % of draws, F(1, 6) > 0.5: nothing separates operators there either. Where operators
    differ by a standard deviation of 0.5 as in real runs, and layers by 0.25, it is 2·0.25²/28/0.5² and never happens.
    """
    rng, alike, apart = np.random.default_rng(0), 0, 0
    operator, layer = np.repeat([f"op{i}" for i in range(7)], 28), np.tile(np.arange(28), 7)
    for _ in range(100):
        noise = 0.25 * rng.standard_normal(196)
        alike += len(depth_halves(operator, layer, noise)[0]) - 7
        apart += len(depth_halves(operator, layer, noise + np.repeat(0.5 * rng.permutation(7), 28))[0]) - 7
    # P(F(1, 6) > 0.5) = 0.506; the seven of a draw share one denominator, so that their mean spreads by about 0.25 a draw.
    assert 0.506 - 0.1 < alike / 700 < 0.506 + 0.1
    assert apart == 0


def test_a_layer_finds_its_half():
    operators = ["attn_v:8-15", "attn_v:0-6", "mlp_up", "my:type:0-1", "my:type:2-3"]
    expected = {0: "attn_v:0-6", 6: "attn_v:0-6", 7: "attn_v:0-6", 8: "attn_v:8-15", 99: "attn_v:8-15"}
    for layer, entry in expected.items():
        assert entry_for(operators, "attn_v", f"layers.{layer}.v_proj.weight") == entry
    assert entry_for(operators, "mlp_up", "layers.3.up.weight") == "mlp_up"
    assert entry_for(operators, "my:type", "layers.3.x.weight") == "my:type:2-3"
    assert entry_for(operators, "attn_v", "v_proj.weight") is None  # of no layer
    assert entry_for(operators, "attn_q", "layers.3.q_proj.weight") is None


def test_a_schedule_knows_halves_by_name_then_by_layer():
    one = OperatorSchedule(((1.0, 0.0, 0.0),), ("layers.9.v.weight",), 0.0, 0.0, 1)
    other = OperatorSchedule(((1.0, 0.0, 0.0),), (), 0.0, 0.0, 1)
    schedule = Schedule({"attn_v:0-1": one, "attn_v:2-3": other})
    assert schedule.operator_of("layers.9.v.weight", "attn_v") == "attn_v:0-1"
    assert schedule.operator_of("layers.8.v.weight", "attn_v") == "attn_v:2-3"
    assert schedule.operator_of("layers.8.v.weight") is None
