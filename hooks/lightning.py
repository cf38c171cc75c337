"""Recording what a Lightning `Trainer` trains: `Trainer(…, callbacks=[OptiscopeCallback("run.zarr")])`."""

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from ..diagnostics.about import Value
from ..diagnostics.catalogue import DEFAULT_GROUPS
from ..diagnostics.operators import OperatorRule
from ..diagnostics.options import HeadsGiven, OnError, Options, Together
from .trainers.callback_session import CallbackSession

# The one library goes by two names, and a Trainer of either takes callbacks of its own name only.
_NAMES = ("lightning.pytorch", "pytorch_lightning")


def _callback_classes() -> tuple[type, ...]:
    """`Callback` of the name that is imported already (of both, if both are), else of the one that is installed."""
    names = [name for name in _NAMES if sys.modules.get(name)] or [name for name in _NAMES if find_spec(name.split(".")[0])][:1]
    if not names:
        raise ImportError('optiscope.hooks.lightning needs lightning or pytorch_lightning: pip install "optiscope[lightning]"')
    return tuple(import_module(name).Callback for name in names)


class OptiscopeCallback(*_callback_classes()):  # type: ignore[misc]
    """Attaches to the trainer's optimizers while it fits, and logs every number that the module logs.

    Numbers of a training step are logged every `log_every_n_steps` steps of the trainer, those of validation and of epochs when
    they are there. Of several processes all take part, and the main process writes. A training resumed from a checkpoint counts on from the checkpoint's step; where
    the run holds records after it already, as after a crash, they are kept as a lineage of their own, which `diag info` lists.
    Fitting again goes on after the last step. A run of another model, or one that another process is writing, is left alone, and
    `run-2.zarr` beside it is recorded to. If recording cannot begin, a warning says why and the training goes on without.

    With `pytorch_lightning`, import that before this module where `lightning` is installed too.
    """

    def __init__(
        self,
        store: str | Path,
        *,
        every: int | None = None,
        overhead: float = 0.01,
        measure: Sequence[str] = DEFAULT_GROUPS,
        operators: OperatorRule | None = None,
        heads: HeadsGiven = None,
        background: bool = False,
        about: Mapping[str, Value] | None = None,
        ranks: Together = "auto",
        rank_timeout: float = 10.0,
        on_error: OnError = "warn",
    ) -> None:
        """`store` and the options are those of :func:`optiscope.hooks.attach`."""
        super().__init__()
        options = Options(
            every=every, overhead=overhead, measure=measure, operators=operators, heads=heads, background=background, about=about,
            ranks=ranks, rank_timeout=rank_timeout, on_error=on_error,
        )  # fmt: skip
        self._session = CallbackSession(store, options)
        self._logged: dict[str, Tensor] = {}
        self._logged_step = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._session.takes_part(trainer.is_global_zero):
            # Lightning counts the steps of all optimizers together.
            self._session.begin(trainer.optimizers, pl_module, trainer.global_step // max(len(trainer.optimizers), 1))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        recorder, every = self._session.recorder, trainer.log_every_n_steps
        # A batch without a step, of a gradient that is being accumulated, has numbers too: not those of the step before it.
        if recorder is not None and every and recorder.step % every == 0 and recorder.step != self._logged_step:
            self._logged_step = recorder.step
            self._log_new(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._log_new(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        # Not at the epoch's end, where its numbers are still to be computed: by all processes together.
        self._log_new(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self._session.flush()  # so that a run has no gap before the checkpoint, whatever happens after it

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._log_new(trainer)
        self._session.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._session.end()

    def _log_new(self, trainer: Any) -> None:
        """Log what is new since the last time: the trainer keeps every number until there is another of its name."""
        if self._session.recorder is None:
            return
        with self._session.guard("numbers of the trainer were not logged"):
            metrics: Mapping[str, Tensor] = trainer.callback_metrics
            # What is read twice is two tensors of one storage; a new number has its own, as the last is still held here.
            new = {name: value for name, value in metrics.items() if name not in self._logged or not _same(value, self._logged[name])}
            self._logged.update(new)
            self._session.log(new)


def _same(value: Tensor, logged: Tensor) -> bool:
    return value.data_ptr() == logged.data_ptr()
