"""One watched optimizer: its matrices, its step count, and what was copied before the step under way."""

import inspect
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..adapters import Adapter, Group, Reading, adapter_for, parameter_state, row_of
from ..adapters.identification import BY_NAMES, Identification
from ..watching.description import facts, read_by, spectrum_of
from ..watching.row_check import RowCheck
from ..watching.watching import Watching
from .copies import Copies, Memory
from .layers import hookable_layers, steps_under_way
from .left_out import LEFT_OUT
from .matrix import Matrix
from .piece_snapshot import PieceSnapshot
from .placement import is_cut, local
from .snapshot import Snapshot

log = logging.getLogger("optiscope")


class Watched:
    """One optimizer: its matrices, how many steps it took, and what was copied before the step under way.

    A wrapper and what it wraps are one: weights are compared around the outermost step, gradients and state are those of the
    innermost optimizer, which a wrapper may also step by itself (SAM's second_step).
    """

    def __init__(self, label: str, layers: list[Optimizer]) -> None:
        """`layers` as :func:`hookable_layers` finds them."""
        self.label = label
        self.layers = layers
        self.optimizer = layers[-1]
        self.matrices: list[Matrix] = []
        self.found = BY_NAMES  # how a class that is not in the adapter table is read, until its identification has concluded
        # None of these looks at pieces: what they compare are a parameter's own numbers, and sums of them that would need other ranks.
        cut = any(is_cut(p) for group in self.optimizer.param_groups for p in group["params"])
        self.identification = None if self.in_table or cut else Identification(self.optimizer)  # while it goes on
        self.watching = None if self.in_table or cut else Watching(self.optimizer)
        self.row_check = RowCheck(self.optimizer) if self.in_table and not cut else None
        self.steps = 0
        self.last_seen = -1  # the step of the whole training at which this one stepped last, −1 before the first
        self.longest_pause = 0  # in steps of the whole training, between two of its own
        self.watched_from = 0  # the step of the whole training from which on its own would have been seen
        self.captured = False  # whether a step was captured into a CUDA graph, and that has been told
        self._entered = 0  # the steps under way, one within the other
        self.skipped: Tensor | None = None  # steps that a GradScaler told a fused optimizer to skip, not yet taken off `steps`
        self.snapshots: list[Snapshot | PieceSnapshot] = []
        self.snapshot_steps = -1  # `steps` when the snapshots were taken; they are of this step only if it still is
        self.changed: dict[Matrix, int] = {}  # what `changed_since` found before this step
        self._told: dict[str, int] = {}  # kinds of matrices of which it was told that they are not recorded, and of how many
        self._weights_left: dict[int, list[float]] = {}  # norms of the weights as the last step left them

    @property
    def in_table(self) -> bool:
        """Whether the optimizer's class has a row in the adapter table."""
        return row_of(self.optimizer) is not None

    @property
    def parameters(self) -> set[int]:
        """The `id` of all that it holds now."""
        return {id(p) for group in self.optimizer.param_groups for p in group["params"]}

    def adapter(self, group: Group) -> Adapter:
        """How the parameters of a group are read."""
        return adapter_for(self.optimizer, group) or self.found

    def stacks(self, group: Group) -> "list[Sequence[Tensor]]":
        """The lists of a group's parameters that are orthogonalised as one matrix, of two and more."""
        stacks = self.adapter(group).stacks
        return [] if stacks is None else [stack for stack in stacks(group) if len(stack) > 1]

    def identify(self, *, after_step: bool) -> bool:
        """Show the gradients, or what the step made of them, to the identification of an unknown class; whether it has concluded.

        One that fails is over, and the class is read by names.
        """
        identification, self.identification = self.identification, None
        found = None
        if identification is not None and after_step:
            found = identification.after_step()
        elif identification is not None:
            identification.see_gradients()
        if found is None:
            self.identification = identification
        else:
            self.found = found
        return found is not None

    def note_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Let adapters read what the coming step is called with; of a step that calls that of its base, what the outer one was."""
        names = inspect.signature(type(self.optimizer).step).parameters
        given = {name: value for name, value in ({**dict(zip(names, args, strict=False)), **kwargs}).items() if value is not self.optimizer}
        given = {name: value for name, value in given.items() if not callable(value)}
        for snapshot in self.snapshots:
            snapshot.reading.arguments = snapshot.reading.arguments or given

    def check_row(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Hold the coming step of a class in the adapter table against its row, once; whether that has told anything."""
        if self.row_check is None or not self.row_check.watch(args[1:], kwargs):
            return False
        if differs := self.row_check.differs:
            log.warning(
                "optiscope: %s is in the adapter table, but a step of a copy differs from its row: %s. What is recorded of it is as the row reads it.",
                self.label, "; ".join(differs),
            )  # fmt: skip
        return True

    def watch_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Watch the coming step of an unknown class on a copy, and read what was snapshotted as that shows it."""
        if self.watching is None:
            return
        self.watching.watch(args[1:], kwargs)
        group_of = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for snapshot in self.snapshots:
            parameter = snapshot.reading.parameter
            snapshot.adapter = self.watching.adapter(snapshot.adapter, group_of[id(parameter)], parameter)

    def compare_watched(self) -> None:
        """After the step: read those parameters as if nothing had been found of which the copy took another step."""
        if self.watching is None:
            return
        self.watching.note_own_settings()
        if len(self.layers) == 1:  # a wrapper does more than the step that was watched
            others = self.watching.compare()
            group_of = {id(p): group for group in self.optimizer.param_groups for p in group["params"]} if others else {}
            for snapshot in self.snapshots:
                if (key := id(snapshot.reading.parameter)) in others:
                    snapshot.adapter = self.adapter(group_of[key])

    def reading_of(self, group: Group) -> tuple[str, str, dict[str, Any]]:
        """How a group is read, what its spectra are of, and what was found by watching, for the run."""
        adapter = self.adapter(group)
        if self.watching is None:
            differs = None if self.row_check is None else self.row_check.of(group)
            said = f"; in the table, but a watched step differs: {'; '.join(differs)}" if differs else ""
            return adapter.read_by, f"{adapter.spectrum_of}{said}", {} if differs is None else {"differs_from_row": differs}
        found = self.watching.of(group)
        return read_by(found, adapter.read_by), spectrum_of(found, adapter.spectrum_of), facts(found, self.optimizer, group)

    # A class whose `step` calls that of its base runs the hooks twice, and so does a wrapper, the inner call within the outer.

    def enter(self) -> bool:
        """Note the beginning of a step; whether it is the outermost one."""
        if self._entered and steps_under_way(self.layers) <= 1:
            self._entered = 0  # the step before was left by an exception
        self._entered += 1
        return self._entered == 1

    def leave(self) -> bool:
        """Note the end of a step; whether it was the outermost one."""
        self._entered = max(self._entered - 1, 0)
        return not self._entered

    @property
    def seen(self) -> bool:
        """Whether a step was seen."""
        return self.last_seen >= 0

    @property
    def silent_since(self) -> int:
        """The step of the whole training since which none of its own was seen."""
        return self.last_seen if self.seen else self.watched_from

    def note_step(self, step: int) -> None:
        """Note that it has stepped, as the whole training comes to `step`."""
        if self.last_seen >= 0 and step - self.last_seen > self.longest_pause:
            self.longest_pause = step - self.last_seen
        self.last_seen = step

    def take_snapshots(
        self, groups: Collection[str], memory: Memory | None = None, is_elsewhere: Callable[[Matrix], bool] = lambda matrix: False
    ) -> None:
        """Copy what the coming step will overwrite and `groups` of quantities need; with `memory` all that they need, to be measured later.

        Of a matrix that `is_elsewhere` nothing is read: another rank does.
        Parameter groups are looked up anew: settings and groups change during a training.
        """
        self.snapshots, self.snapshot_steps = [], self.steps
        group_of = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        of_parameter: dict[int, list[Matrix]] = {}
        for matrix in self.matrices:
            if not matrix.members and id(matrix.parameter) in group_of and (is_cut(matrix.parameter) or not is_elsewhere(matrix)):
                of_parameter.setdefault(id(matrix.parameter), []).append(matrix)
        adapters = {id(group): self.adapter(group) for group in self.optimizer.param_groups}
        for matrices in of_parameter.values():
            parameter = matrices[0].parameter
            group = group_of[id(parameter)]
            copies = None if memory is None else Copies(memory)
            if is_cut(parameter):
                assert copies is not None  # ranks that record together always copy
                reading = Reading(self.optimizer, parameter, parameter, dict(group), {})
                self.snapshots.append(
                    PieceSnapshot(matrices, adapters[id(group)], reading, "gradient" in groups, "geometry" in groups, copies)
                )
                continue
            weight = parameter.detach().clone() if copies is None else copies.of(parameter)
            reading = Reading(self.optimizer, parameter, weight, dict(group), parameter_state(self.optimizer, parameter))
            self.snapshots.append(
                Snapshot(
                    matrices, adapters[id(group)], reading, "gradient" in groups, "geometry" in groups, copies,
                    wrapped=len(self.layers) > 1, tell_sparse=self.tell_sparse_gradient,
                )
            )  # fmt: skip

    def has_state(self) -> dict[str, bool]:
        """Whether the optimizer keeps state of each parameter that is whole here, by name."""
        whole = (m for m in self.matrices if not m.members and not is_cut(m.parameter))
        return {m.parameter_name: bool(parameter_state(self.optimizer, m.parameter)) for m in whole}

    def tell_left_out(self, names: Mapping[str, Sequence[str]]) -> None:
        """Say which matrices are not recorded, and why: names by kind (`LEFT_OUT`). Again only where there are more of a kind."""
        for kind, of_kind in names.items():
            if len(of_kind) > self._told.get(kind, 0):
                self._told[kind] = len(of_kind)
                log.warning(
                    "optiscope: %d %s %s of %s (the first: %s) %s not recorded: %s.", len(of_kind), kind, "matrix" if len(of_kind) == 1 else "matrices",
                    self.label, of_kind[0], "is" if len(of_kind) == 1 else "are", LEFT_OUT[kind],
                )  # fmt: skip

    def tell_sparse_gradient(self, name: str) -> None:
        """Say once what is not recorded of matrices whose gradients are sparse, `name` being the first."""
        if "gradient" not in self._told:
            self._told["gradient"] = 1
            log.warning(
                "optiscope: %s gets sparse gradients (the first: %s). Of such matrices neither update, gradient, spectrum nor optimizer state is recorded, "
                "only whether something else than the optimizer changed them; build the layer with sparse=False to have them recorded.",
                self.label, name,
            )  # fmt: skip

    def note_weights(self) -> None:
        """Keep the weights' norms as this step leaves them, to see at the next one whether something else changed them."""
        self._weights_left = self._norms()

    def forget_weights(self) -> None:
        """Keep none: another step has been taken since."""
        self._weights_left = {}

    def changed_since(self) -> dict[Matrix, int]:
        """Per matrix whether its weights changed since `note_weights`: 1, 0, or −1 where that is not known."""
        left, self._weights_left = self._weights_left, {}
        now = self._norms() if left else {}
        changed: dict[Matrix, int] = {}
        for matrix in (m for m in self.matrices if not m.members):
            before, after = left.get(id(matrix.parameter)), now.get(id(matrix.parameter))
            if before is None or after is None:
                changed[matrix] = -1
            else:
                # NaN is the same as NaN here: a training that diverged has not been changed from outside.
                changed[matrix] = int(any(a != b and not (a != a and b != b) for a, b in zip(before, after, strict=True)))
        return changed

    def _norms(self) -> dict[int, list[float]]:
        """ΣW and ‖W‖_2 of every parameter, fetched at once per device and format: less than half the time of ‖W‖_1 and ‖W‖_2."""
        parameters = {id(m.parameter): local(m.parameter.detach()) for m in self.matrices if not m.members}
        kinds: dict[Any, dict[int, Tensor]] = {}
        for key, weight in parameters.items():
            kinds.setdefault((weight.device, weight.dtype), {})[key] = weight
        found: dict[int, list[float]] = {}
        for (_, dtype), weights in kinds.items():
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            sums = torch.stack([weight.sum(dtype=wide) for weight in weights.values()])
            norms = torch.stack(list(torch._foreach_norm(list(weights.values()), 2, wide)))
            found.update(zip(weights, torch.stack([sums, norms], 1).tolist(), strict=True))
        return found

    def let_go(self) -> None:
        """Drop all copies of weights and gradients, and the parameters."""
        self.snapshots, self.matrices, self.changed, self._weights_left = [], [], {}, {}
        self.identification = self.watching = self.row_check = None

    def note_skip(self) -> None:
        """Add this step to the skipped ones if the scaler found infinities, without waiting for the accelerator."""
        found = getattr(self.optimizer, "found_inf", None)
        if isinstance(found, Tensor):
            self.skipped = found.detach().clone() if self.skipped is None else self.skipped + found

    def take_off_skipped(self) -> bool:
        """Take skipped steps off the count; whether there were any. Waits for the accelerator: on recorded steps only."""
        skipped, self.skipped = int(self.skipped or 0), None
        self.steps -= skipped
        return skipped > 0


def watch(optimizers: Iterable[Any], watched: Sequence[Watched] = ()) -> list[Watched]:
    """Optimizers under the names of their classes, numbered where a class occurs twice: `Muon`, `AdamW`, `AdamW#2`.

    `watched` are those that are watched already; they are not watched twice.

    Raises:
        TypeError: something is no optimizer.
    """
    layers = {id(layer) for one in watched for layer in one.layers}
    names = [one.label.split("#")[0] for one in watched]
    new: list[Watched] = []
    for optimizer in optimizers:
        found = hookable_layers(optimizer)
        if not found:
            raise TypeError(f"optimizers: expected torch.optim.Optimizer objects, got {type(optimizer).__name__}")
        if layers.isdisjoint(map(id, found)):
            names.append(type(found[0]).__name__)
            count = names.count(names[-1])
            new.append(Watched(f"{names[-1]}#{count}" if count > 1 else names[-1], found))
            layers.update(map(id, found))
    return new
