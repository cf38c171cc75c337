"""State that an optimizer keeps for a whole group in one tensor, seen parameter by parameter.

Some Muons stack the K matrices of a group, which have one shape, and keep one momentum of shape (K, m, n), and second moments of (K, m, 1) or
(K, 1, n), under the group's first parameter (nanochat), in the group, or in the state under a key of their own.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def stacked_state(optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
    """The parameter's parts of what is kept for its whole group, by the same keys; empty where nothing is."""
    for group in optimizer.param_groups:
        params = group["params"]
        row = next((i for i, p in enumerate(params) if p is parameter), None)
        if row is None:
            continue
        if len(params) < 2 or any(p.shape != parameter.shape for p in params):
            return {}
        return {
            key: tensor[row] for holder in _holders(optimizer, group) for key, tensor in holder.items()
            if isinstance(key, str) and isinstance(tensor, Tensor) and _stacks(tensor, len(params), parameter)
        }  # fmt: skip
    return {}


def _holders(optimizer: Any, group: Mapping[str, Any]) -> Iterator[Mapping[Any, Any]]:
    """Where such tensors are kept."""
    states = optimizer.state
    if isinstance(states, Mapping):
        for key in (group["params"][0], tuple(group["params"][0].shape)):
            state = states.get(key)
            if isinstance(state, Mapping):
                yield state
    yield {key: value for key, value in group.items() if key != "params"}


def _stacks(tensor: Tensor, count: int, parameter: Tensor) -> bool:
    """Whether it has one part per parameter, of its shape or with an axis that was averaged away."""
    shape = tuple(parameter.shape)
    return (
        tensor.ndim == len(shape) + 1
        and tensor.shape[0] == count
        and all(size in (1, own) for size, own in zip(tensor.shape[1:], shape, strict=True))
        and tensor.numel() > count
    )
