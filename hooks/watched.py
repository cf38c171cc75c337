"""One watched optimizer: its matrices, its step count, and what was copied before the step under way."""

from torch import Tensor
from torch.optim import Optimizer

from .adapters import State, adapter_for
from .matrices import Matrix
from .snapshot import Snapshot, take_snapshot


class Watched:
    """One optimizer: its matrices, how many steps it took, and what was copied before the step under way."""

    def __init__(self, label: str, optimizer: Optimizer, matrices: list[Matrix], first_step: int) -> None:
        self.label = label
        self.optimizer = optimizer
        self.adapter = adapter_for(optimizer)
        self.matrices = matrices
        self.steps = first_step
        self.stepping = self.seen = False
        self.skipped: Tensor | None = None  # steps that a GradScaler told a fused optimizer to skip, not yet taken off `steps`
        self.snapshots: list[Snapshot] = []
        self.snapshot_steps = -1  # `steps` when the snapshots were taken; they are of this step only if it still is

    def state_of(self, matrix: Matrix) -> State:
        """The optimizer's state of a parameter. `get`, not `[]`: the state is a defaultdict, looking must not add to it."""
        return self.optimizer.state.get(matrix.parameter) or {}

    def take_snapshots(self) -> None:
        """Copy what the coming step will overwrite. Groups are looked up anew: settings and groups change during a training."""
        self.snapshots, self.snapshot_steps = [], self.steps
        group_of = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        self.snapshots = [take_snapshot(m, group_of[id(m.parameter)], self.adapter) for m in self.matrices if id(m.parameter) in group_of]

    def note_skip(self) -> None:
        """Add this step to the skipped ones if the scaler found infinities, without waiting for the accelerator."""
        found = getattr(self.optimizer, "found_inf", None)
        if found is not None:
            self.skipped = found.detach().clone() if self.skipped is None else self.skipped + found

    def take_off_skipped(self) -> bool:
        """Take skipped steps off the count; whether there were any. Waits for the accelerator: on recorded steps only."""
        skipped, self.skipped = int(self.skipped or 0), None
        self.steps -= skipped
        return skipped > 0
