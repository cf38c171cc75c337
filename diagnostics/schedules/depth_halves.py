"""Do the halves of an operator's layers differ more than operators do? Then it is two operators to a schedule.

Type alone ignores depth: late layers of a type may need other steps than early ones.
"""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..operators import layer_index, ordered

# Under this number of layers a half is a single one, whose difference from the other is no statement about depth.
LAYERS = 4

_HALF = re.compile(r"(.+):(\d+)-(\d+)")


def depth_halves(
    operator: NDArray[Any], layer: NDArray[np.integer[Any]], log_kappa: ArrayLike, *, cut: bool = True
) -> tuple[dict[str, NDArray[np.bool_]], dict[str, dict[str, float]]]:
    """The operators of a schedule, an operator cut in two by depth where its halves' variance of log κ exceeds that between operators.

    Both are sample variances of means over matrices: of an operator's two halves, and of all operators (0 where there is one).

    Args:
        operator, layer: of every matrix, shape (matrices,).
        log_kappa: log₁₀ of the condition number of every matrix, shape (matrices,).
        cut: whether to cut; False only tests.

    Returns:
        Operator, or its half with the range of its layers ("attn_v:0-13"), → which matrices are its own, shape (matrices,); and what was
        tested: operator → both variances. An operator of under 4 layers, or one with a matrix outside of layers, is neither tested nor cut.

    >>> operator, layer = np.array(["attn_q"] * 4 + ["mlp_up"] * 4), np.array([0, 1, 2, 3] * 2)
    >>> members, tested = depth_halves(operator, layer, [1, 1, 3, 3, 2, 2, 2.4, 2.4])
    >>> list(members), round(tested["attn_q"]["between_halves"], 3), round(tested["attn_q"]["between_operators"], 3)
    (['attn_q:0-1', 'attn_q:2-3', 'mlp_up:0-1', 'mlp_up:2-3'], 2.0, 0.02)
    """
    kappa = np.asarray(log_kappa, np.float64)
    whole = {o: operator == o for o in ordered(operator.tolist())}
    means = [kappa[own].mean() for own in whole.values()]
    between = float(np.var(means, ddof=1)) if len(means) > 1 else 0.0
    members: dict[str, NDArray[np.bool_]] = {}
    tested: dict[str, dict[str, float]] = {}
    for name, own in whole.items():
        layers = np.unique(layer[own])
        members[name] = own
        if len(layers) < LAYERS or layers[0] < 0:
            continue
        parts = np.array_split(layers, 2)
        halves = {f"{name}:{part[0]}-{part[-1]}": own & np.isin(layer, part) for part in parts}
        within = float(np.var([kappa[half].mean() for half in halves.values()], ddof=1))
        tested[name] = {"between_halves": within, "between_operators": between}
        if cut and within > between:
            del members[name]
            members |= halves
    return members, tested


def entry_for(operators: Iterable[str], operator: str, name: str) -> str | None:
    """Which of a schedule's operators a parameter of type `operator` belongs to: that type, or the half of it that its layer lies in.

    Layers between the halves belong to the first, as those of a stack of layers do that is named for its first one.

    >>> entry_for(["mlp_up", "attn_v:0-13", "attn_v:14-27"], "attn_v", "layers.14.v_proj.weight")
    'attn_v:14-27'
    """
    known = list(operators)
    if operator in known:
        return operator
    layer = layer_index(name)
    halves = sorted((int(half[2]), half[0]) for other in known if (half := _HALF.fullmatch(other)) and half[1] == operator)
    if not halves or layer < 0:
        return None
    return next((half for first, half in reversed(halves) if first <= layer), halves[0][1])
