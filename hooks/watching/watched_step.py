"""One step of an optimizer, watched on a copy: which of its parameters an iteration orthogonalises, what that is given and what follows it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .iterations import Chain, Iterations, find_output
from .matching import Match, match
from .ns_input import Given, given_to
from .trace import Trace, Tracing, sample
from .twin import Twin, nothing_drawn_or_compiled
from .weight_writes import WeightWrites


@dataclass(frozen=True)
class WatchedStep:
    """What was seen of one step of one parameter group.

    Attributes:
        matches: every iterated matrix and what it moved.
        given: what each was given, None where that was not found; in the same order.
        chains: all iterations that were seen, those whose output moves nothing included.
        factors: by which weights were multiplied once their update was in them, as :meth:`.weight_writes.WeightWrites.factors` gives them.
        trace: all matrices that were made, and copies of what the iterations were given.
        twin: the copy after the step.
    """

    matches: tuple[Match, ...]
    given: tuple[Given | None, ...]
    chains: tuple[Chain, ...]
    factors: Mapping[int, Tensor]
    trace: Trace
    twin: Twin

    def input_of(self, i: int) -> Tensor | None:
        """The whole matrix that the iteration of the i-th match was given, in the parameter's orientation."""
        given, found = self.given[i], self.matches[i]
        captured = None if given is None else self.trace.captured.get(given.at)
        if given is None or captured is None:
            return None
        matrix = captured.reshape(-1, *captured.shape[-2:])[given.row]
        return matrix.mT if given.transposed != found.transposed else matrix


def watch_step(
    optimizer: Any, group: Mapping[str, Any], parameters: Sequence[Tensor], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None,
    gradients: Mapping[int, Tensor] | None = None,
) -> WatchedStep:  # fmt: skip
    """Watch the coming step of some parameters of a group on a copy; nothing of the optimizer or the training changes.

    The step is run once to find the iterations, and once more to copy what they were given. `group` may differ from the optimizer's own in its settings, to
    see what those do; `gradients`, by `id`, take the place of the parameters' own.

    Raises:
        Exception: whatever keeps the optimizer from being copied or the copy from being stepped.
    """
    twin, trace, iterations, writes = _run(optimizer, group, parameters, args, kwargs, gradients)
    factors = writes.factors(group)
    for chain in iterations.chains:
        find_output(chain, trace)
    before = {id(p): p.detach() for p in parameters}
    after = {key: p.detach() for key, p in twin.parameters.items()}
    after.update({key: after[key] / factor for key, factor in factors.items() if bool((factor != 1).any())})
    matches = match(iterations.chains, before, after)
    given = [given_to(found.chain, found.row, trace.seen) for found in matches]
    asked = frozenset(one.at for one in given if one is not None)
    if asked:
        del twin, writes, after  # one copy at a time
        twin, again, *_ = _run(optimizer, group, parameters, args, kwargs, gradients, asked)
        trace.captured = again.captured
        seen = {one.at: one.sample for one in trace.seen if one.at in asked}
        if trace.captured.keys() != asked or any(not torch.equal(sample(trace.captured[at]), seen[at]) for at in asked):
            raise RuntimeError("two runs of the same step of a copy differ")
    return WatchedStep(tuple(matches), tuple(given), tuple(iterations.chains), factors, trace, twin)


def _run(
    optimizer: Any, group: Mapping[str, Any], parameters: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any] | None,
    gradients: Mapping[int, Tensor] | None, capture: frozenset[tuple[int, int]] = frozenset(),
) -> tuple[Twin, Trace, Iterations, WeightWrites]:  # fmt: skip
    """One step of a copy: seen, or with `capture` only what was asked for copied."""
    with nothing_drawn_or_compiled([p.device for p in parameters]), torch.no_grad():
        twin = Twin(optimizer, group, parameters, gradients)
        tracing = Tracing(twin.tensors, capture)
        iterations = Iterations(tracing.trace)
        tracing.tell_gram = iterations.see
        writes = WeightWrites(twin.parameters)
        tracing.around_write = None if capture else writes.around
        for i, tensor in enumerate(twin.tensors):
            tracing.see((-1, i), tensor)
        with tracing:
            twin.step(args, kwargs)
    return twin, tracing.trace, iterations, writes
