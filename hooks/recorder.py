"""The recorder: what a user holds of a recording."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from torch.utils.hooks import RemovableHandle

from .curvature.group import CurvatureGroup
from .curvature.recording import record_curvature
from .observing.watched import watch
from .recording.record import Record
from .recording.session import Session
from .recording.step_hooks import watch_steps


class Recorder:
    """Watches optimizers and writes a run; made by :func:`attach`.

    Attributes:
        session: the recording itself, for what acts on it while it goes on.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._curvature = CurvatureGroup(session.extra_layout(["curvature"]))

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(compact=kind is None)

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.session.step

    @property
    def first_step(self) -> int:
        """Of them, those taken before it was attached."""
        return self.session.first_step

    @property
    def store(self) -> Path:
        """Where the run is."""
        return self.session.store

    @property
    def errors(self) -> int:
        """How many measurements failed."""
        return self.session.journal.errors

    @property
    def dropped(self) -> int:
        """Steps of which a record was lost, the store having stayed unwritable, or logged numbers, the background's thread having been busy."""
        return self.session.journal.dropped

    @property
    def missed(self) -> int:
        """Records that were due while the one before was still being measured in the background."""
        return self.session.journal.missed

    @property
    def overhead_seconds(self) -> float:
        """Wall time that recording has taken from the training thread."""
        return self.session.journal.clock.wall

    @property
    def overhead_cpu_seconds(self) -> float:
        """CPU time that recording has taken: of all threads; in the background of the training thread and the worker's."""
        return self.session.journal.cpu

    @property
    def background_cpu_seconds(self) -> float:
        """CPU time of the worker's thread; 0 where recording is not in the background."""
        return self.session.journal.worker_clock.finished_cpu

    def log(self, /, **scalars: Any) -> None:
        """Record numbers of your own (loss, accuracy, …) at the current step; several calls at one step are merged.

        A tensor is read with `float()`, which waits for an accelerator: log only as often as you would print. A slash in
        a name, which in the store would mean a group, becomes a dot. After `close` they are written at once.
        """
        self.session.in_turn(self.session.log, scalars)

    def flush(self) -> None:
        """Write and commit every complete record now. Where that fails, the newest records are kept and tried again."""
        self.session.in_turn(self.session.flush)

    def curvature(
        self,
        loss_fn: Callable[[], Any] | None = None,
        /,
        *,
        logits_fn: Callable[[], Any] | None = None,
        probes: int = 1,
        draws: int = 1,
        distribution: Literal["rademacher", "gaussian"] = "rademacher",
        method: Literal["auto", "double_backward", "central_difference"] = "auto",
        block_probes: int = 0,
        exact: int = 0,
        only: str | None = None,
    ) -> None:
        """Estimate the Hessian of a loss and record it at the current step, whenever you like: between steps, at any cadence.

        What is estimated is of the matrices that are recorded and can be trained; a parameter that is frozen stays missing, one
        that the loss does not use has zeros. Training is bitwise what it would be without the call: weights, gradients, buffers,
        modes and the state of all global random generators are put back; probes come from a generator of the recorder's own. An error
        gives a warning and missing values.

        Args:
            loss_fn: takes nothing and returns the mean loss of the model on a batch of your choice, as a tensor with its graph. Get the batch
                outside of it, so that training's data go on as they would; it may be called several times. Each call begins
                with the same random numbers, so that dropout is the same in all. In a distributed run let it call the bare
                model: a wrapper would wait for the other processes.
            logits_fn: takes nothing and returns the model's logits, shape (…, classes), of all predictions that the loss is a mean of
                (no padding). With it the Gauss–Newton diagonal is estimated, with or without a `loss_fn`.
            probes: random vectors for the Hessian's diagonal. One costs about 3 training steps, each further one 2. A mean and its error
                are there from the first on, quantiles over elements from 64 on.
            draws: of all labels, for the Gauss–Newton diagonal; each costs a backward pass.
            distribution: of the vectors; "rademacher" has less noise.
            method: "double_backward" is exact; "central_difference" needs no second backward pass, which some kernels lack (attention on
                the CPU); "auto": the first where it works.
            block_probes: further vectors per matrix for the share of its Hessian inside Adam-mini's blocks; each costs about 2 steps
                per matrix.
            exact: take exact Hessians of consecutive rows of every matrix with together up to this many coordinates (256 for a look;
                0: none), from which follow a map and what Adam's diagonal does to the conditioning. Each coordinate costs up to
                2 steps, less on a small batch.
            only: a regular expression: of the recorded matrices those in whose name it is found.

        Several calls at one step are merged: of a quantity that two of them measure, the later one's values stay.
        """
        self.session.in_turn(
            lambda: record_curvature(
                self.session, self._curvature, loss_fn, logits_fn=logits_fn, probes=probes, draws=draws, distribution=distribution,
                method=method, block_probes=block_probes, exact=exact, only=only,
            )
        )  # fmt: skip

    def watch(self, *optimizers: Any, steps: int | None = None) -> None:
        """Record further optimizers, made after `attach`; those that are watched already stay as they are.

        Their matrices get their rows in the run at the next record. One that holds all matrices of a watched one takes its place, as an optimizer
        that was made anew does. (Parameters that are added to a watched optimizer need no call.)
        `steps` are those that count as taken by them, by default all that the recorder has counted.

        Raises:
            TypeError: something is no optimizer.
        """
        session = self.session
        for one in watch(optimizers, session.watched) if session.is_open else []:  # one that is closed stays closed
            replaced = session.replaced_by(one)
            one.steps = session.step if steps is None else steps
            watch_steps(session, one)  # before the others go: a session that watches none has ended
            for former in replaced:
                session.retire(former)
            session.guarded(session.describe, one)

    def on_record(self, listener: Callable[[Record], None]) -> RemovableHandle:
        """Call `listener` with every record as soon as it is complete: after the step that completed it, its rows handed to the writer.

        A record knows its `step`, its `rows` by group and, in `row_of`, which row is which matrix. They are the writer's too: look, do
        not change them. What the listener raises is counted and told of like any other error of the recorder. Its time is on
        the recorder's clock, but records are not spaced by it. What it calls of the recorder (`log`, `flush`, `curvature`, `close`) is done
        when the listeners have returned. In the background it is called after the first step by whose end the record is written, which is later
        and depends on chance; in the training thread as ever.

        Returns:
            A handle, whose `remove()` ends it.

        Raises:
            ValueError: the recorder is closed.
        """
        if not self.session.is_open:
            raise ValueError("recorder: expected one that is open, got one that is closed and makes no more records; attach again")
        return self.session.on_record(listener)

    def close(self, *, compact: bool = True) -> None:
        """Detach from the optimizers and commit what was recorded. Closing twice is harmless.

        With `compact`, a run of more than 1,024 records is then laid out for reading, which may take seconds; it is not when the process is being ended.
        A signal handler may call it: where it interrupts the recorder's own work, this is finished first, and the recorder closed as soon as it is.
        """
        self.session.close(compact=compact)
