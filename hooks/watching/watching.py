"""Watching the steps of one optimizer: which of its parameters are orthogonalised and how, for as long as that is not settled."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isclose, isnan, nan
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapter, Group, Orthogonalisation, Reading, number, parameter_state
from ..guard import KeptOut
from .input_rule import Rule, described, rules
from .iterated import Iterated, iterated
from .trace import sample
from .watched_step import WatchedStep, watch_step

_SETTLED = 3  # recorded steps on which a rule gives every input to the bit, so that no further one is watched
_TRIES = 2  # steps of which a copy could not be made, after which none is made any more
SAME_STEP = 0.5  # relative difference of the copy's step from the optimizer's own: compiled code rounds otherwise (0.2 where a momentum has few directions), another step is 1 away
_SAME_DECAY, _SAME_SCALE = 0.05, 0.02  # relative distance of what was measured from what is one with it
_LARGEST = 1 << 26  # entries of the parameters that are copied at once, where they can be copied apart
_VARY = (
    "params",
    "lr",
    "initial_lr",
    "weight_decay",
    "wd",
    "step",
    "momentum",
    "betas",
    "beta",
    "mu",
)  # settings whose change says nothing of the iteration

_LIKELIEST = attrgetter("likelihood")


@dataclass
class OfGroup:
    """What has been found of one parameter group with some settings.

    Attributes:
        found: of the last watched step, by the `id` of the parameter; inputs are dropped once they have been recorded.
        rules: those that gave every input to the bit on all steps so far, and scales that stayed the same.
        agreed: on how many steps in a row.
        without: on how many steps weights moved and no iteration was found.
        matrices: how many were watched.
        inputs: what the inputs are, in words, and of how many.
        factors: by which the last watched step multiplied weights once their update was in them, by the `id` of the parameter.
        rescaled: of parameters that were ever multiplied so the least and the largest factor, those of 1 aside.
        rescales: whether steps may do so: later ones are watched however well a rule agrees, as no formula of the state tells when.
        difference: of the copy's step from the optimizer's own, the largest, relative; NaN before any.
        failed: why copies could not be stepped, one after the other.
    """

    settings: str
    found: dict[int, Iterated] = field(default_factory=dict)
    rules: set[Rule] = field(default_factory=set)
    agreed: int = 0
    without: int = 0
    matrices: int = 0
    inputs: Counter[str] = field(default_factory=Counter)
    factors: dict[int, Tensor] = field(default_factory=dict)
    rescaled: dict[int, tuple[float, float]] = field(default_factory=dict)
    rescales: bool = False
    difference: float = nan
    failed: list[str] = field(default_factory=list)

    @property
    def rule(self) -> Rule | None:
        """The rule that gives every input from now on; None where the recorded steps have to be watched, as long as several kinds of rule give the same."""
        if self.rescales or self.agreed < _SETTLED or len({rule.kind for rule in self.rules}) != 1:
            return None
        return min(self.rules, key=_LIKELIEST)

    @property
    def settled(self) -> bool:
        """Whether a copy's step would tell nothing more."""
        return len(self.failed) >= _TRIES or self.without >= _TRIES or self.rule is not None

    def note_factors(self, factors: Mapping[int, Tensor]) -> None:
        """Those of a watched step."""
        self.factors.update(factors)
        for key, factor in factors.items():
            if (seen := factor[factor != 1]).numel():
                least, most = self.rescaled.get(key, (inf, -inf))
                self.rescaled[key] = min(least, float(seen.min())), max(most, float(seen.max()))
        self.rescales = self.rescales or bool(self.rescaled)


class Watching:
    """Of one optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._groups: dict[int, OfGroup] = {}
        self._told: list[tuple[Any, ...]] = []
        self._before: dict[int, dict[str, Any]] = {}  # settings of every group before the step under way
        self._own: dict[int, set[str]] = {}  # those that the steps themselves change: counts, Prodigy's distance
        self._samples: dict[int, tuple[Tensor, Tensor]] = {}  # of weights after the copy's step, and of those before it

    def of(self, group: Group) -> OfGroup:
        """What has been found of a group; anew where its settings have changed."""
        settings = self._settings(group)
        found = self._groups.get(id(group))
        if found is None or found.settings != settings:
            found = self._groups[id(group)] = OfGroup(settings, rescales=_names_a_clip(self._optimizer, group))
        return found

    def _settings(self, group: Group) -> str:
        left_out = {*_VARY, *self._own.get(id(group), ())}
        return repr({key: value for key, value in group.items() if key not in left_out and _is_plain(value)})

    def watch(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Watch the coming step of every group that is not settled. Gradients are there, and weights as they were."""
        groups = self._optimizer.param_groups
        self._samples = {}
        self._before = {id(group): {key: value for key, value in group.items() if _is_plain(value)} for group in groups}
        for group in groups:
            found = self.of(group)
            found.factors = {}
            if not found.settled:
                self._watch_group(group, found, args, kwargs)

    def _watch_group(self, group: Group, found: OfGroup, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None and p.numel()]
        matrices = [p for p in parameters if p.ndim >= 2 and p.is_floating_point()]
        if not matrices:
            return
        before, found.found, found.inputs, moved = found.found, {}, Counter(), False
        agreeing: set[Rule] | None = None
        for some in self._at_once(parameters):
            seen: WatchedStep | None = None
            with KeptOut(lambda error: found.failed.append(f"{type(error).__name__}: {error}".partition("\n")[0])):
                seen = watch_step(self._optimizer, group, some, args, kwargs)
            if seen is None:
                found.found = {}
                return
            moved = self._sample(seen, some) or moved
            found.note_factors(seen.factors)
            of_some = iterated(seen, some, number(group.get("lr")))
            found.found.update(of_some)
            for p in some:
                if (one := of_some.get(id(p))) is None or one.ns_input is None:
                    continue
                twin = seen.twin.parameters[id(p)]
                given = (one.ns_input, p.grad, parameter_state(seen.twin.optimizer, twin), seen.twin.optimizer.param_groups[0])
                exact = rules(*given)
                agreeing = exact if agreeing is None else agreeing & exact
                found.inputs[str(min(exact, key=_LIKELIEST)) if exact else described(*given)] += 1
        found.failed.clear()
        found.matrices = len(matrices)
        if found.found:
            found.without = 0
            same = all(_same_scale(before.get(key), one) for key, one in found.found.items())
            found.rules = (
                (agreeing or set()) & (found.rules if found.agreed else (agreeing or set())) if same or not found.agreed else set()
            )
            found.agreed = found.agreed + 1 if found.rules else 0
        elif moved:
            found.without += 1

    def _at_once(self, parameters: Sequence[Tensor]) -> list[list[Tensor]]:
        """Parameters to copy together: all of a group; of a large one that keeps state parameter by parameter, those of one shape."""
        if sum(p.numel() for p in parameters) <= _LARGEST or any(not self._optimizer.state.get(p) for p in parameters):
            return [list(parameters)]
        by_shape: dict[Any, list[Tensor]] = {}
        for p in parameters:
            by_shape.setdefault(p.shape, []).append(p)
        return list(by_shape.values())

    def _sample(self, seen: WatchedStep, parameters: Sequence[Tensor]) -> bool:
        """Keep samples of the weights before and after the copy's step; whether any moved."""
        moved = False
        for p in parameters:
            if p.ndim >= 2 and p.is_floating_point():
                after, before = (sample(w.detach().reshape(len(w), -1)) for w in (seen.twin.parameters[id(p)], p))
                self._samples[id(p)] = after, before
                moved = moved or not torch.equal(after, before)
        return moved

    def note_own_settings(self) -> None:
        """After the step: settings that it has changed itself say nothing of the iteration."""
        for group in self._optimizer.param_groups:
            before = self._before.get(id(group))
            if before is None:
                continue
            changed = {key for key, value in group.items() if _is_plain(value) and (key not in before or before[key] != value)}
            if changed - self._own.get(id(group), set()):
                self._own.setdefault(id(group), set()).update(changed)
                self._groups[id(group)].settings = self._settings(group)

    def compare(self) -> set[int]:
        """After the step: the parameters, by their `id`, of which the copy took another step than the optimizer."""
        others: set[int] = set()
        for group in self._optimizer.param_groups:
            found = self.of(group)
            for p in group["params"]:
                if id(p) not in self._samples or id(p) not in found.found:
                    continue
                twin, before = self._samples[id(p)]
                own = sample(p.detach().reshape(len(p), -1))
                size = float((own - before).norm())
                difference = float((own - twin).norm()) / size if size else float(not torch.equal(own, twin))
                found.difference = max(difference, 0.0 if isnan(found.difference) else found.difference)
                if difference > SAME_STEP:
                    others.add(id(p))
        self._samples = {}
        return others

    def learned(self) -> bool:
        """Once a record is read: drop the copies of what iterations were given; whether something has been found since this was last asked."""
        for found in self._groups.values():
            found.found = {key: replace(one, ns_input=None) for key, one in found.found.items()}
        before, self._told = (
            self._told,
            [(len(f.found), len(f.failed), f.without, f.settled, tuple(f.rescaled.values())) for f in self._groups.values()],
        )
        return before != self._told

    def adapter(self, base: Adapter, group: Group, parameter: Tensor) -> Adapter:
        """How a parameter is read on the step that was just watched, or as a rule settles it: by `base`, and by what was found."""
        found = self.of(group)
        one, rule = found.found.get(id(parameter)), found.rule
        if id(parameter) in found.factors:
            factor = found.factors[id(parameter)]
            base = replace(base, weight_factor=lambda reading: factor)
        if one is None or one.part not in ("whole", "slice"):
            return base
        lr = number(group.get("lr"))
        decay = one.decay / lr if lr else nan

        def ns_input(reading: Reading) -> Tensor | None:
            return one.ns_input if rule is None else rule.apply(reading.gradient, reading.state, reading.group)

        def decoupled_decay(reading: Reading) -> float:
            """That of the group, where it is what was measured."""
            own = number(reading.group.get("weight_decay", reading.group.get("wd", 0.0)))
            return nan if one.cautious else own if isclose(own, decay, rel_tol=_SAME_DECAY) else decay

        return replace(
            base,
            orthogonalisation=Orthogonalisation(
                ns_input, lambda reading: one.newton_schulz, lambda reading, rows, cols: one.per_lr, batched=one.part == "slice"
            ),
            decoupled_decay=decoupled_decay,
        )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str, type(None)))


def _names_a_clip(optimizer: Any, group: Group) -> bool:
    """Whether a class or a setting is called after a clip, and not one of gradients: weights may be clipped on any later step."""
    names = [type(optimizer).__name__, *vars(optimizer), *map(str, group)]
    return any("clip" in name.lower() and not any(of in name.lower() for of in ("grad", "norm")) for name in names)


def _same_scale(before: Iterated | None, now: Iterated) -> bool:
    """Whether what a rule takes for constant is."""
    if before is None:
        return False
    return (
        before.coefficients == now.coefficients
        and before.factor == now.factor
        and (isnan(before.per_lr) == isnan(now.per_lr) and (isnan(now.per_lr) or isclose(before.per_lr, now.per_lr, rel_tol=_SAME_SCALE)))
    )
