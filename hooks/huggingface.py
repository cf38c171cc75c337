"""Recording what a `transformers.Trainer` trains: `Trainer(…, callbacks=[OptiscopeCallback("run.zarr")])`."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..diagnostics.about import Value
from ..diagnostics.catalogue import DEFAULT_GROUPS
from ..diagnostics.operators import OperatorRule
from ..diagnostics.options import HeadsGiven, OnError, Options, Together
from .trainers.callback_session import CallbackSession

if find_spec("transformers") is None:
    raise ImportError('optiscope.hooks.huggingface needs transformers: pip install "optiscope[hf]"')

from transformers import TrainerCallback


class OptiscopeCallback(TrainerCallback):
    """Attaches to the trainer's optimizer while it trains, and logs every number that the trainer logs.

    Of several processes all take part, and the main process writes. A training resumed from a checkpoint counts on from the checkpoint's step; where the run holds
    records after it already, as after a crash, they are kept as a lineage of their own, which `diag info` lists. Training
    again goes on after the last step. A run of another model, or one that another process is writing, is left alone, and
    `run-2.zarr` beside it is recorded to. If recording cannot begin, a warning says why and the training goes on without.

    The trainer tells its callbacks nothing of an exception that ends it. What was recorded until then is committed when the
    interpreter ends, when training begins again, when the trainer is thrown away, or by `close()`, whichever comes first.
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
        options = Options(
            every=every, overhead=overhead, measure=measure, operators=operators, heads=heads, background=background, about=about,
            ranks=ranks, rank_timeout=rank_timeout, on_error=on_error,
        )  # fmt: skip
        self._session = CallbackSession(store, options)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        # Not earlier: a checkpoint is loaded by now, and the optimizer is made only shortly before.
        if self._session.takes_part(state.is_world_process_zero):
            self._session.begin(optimizer, model, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._session.log(logs or {})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._session.flush()  # so that a run has no gap before the checkpoint, whatever happens after it

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._session.end()

    def close(self) -> None:
        """Detach now and commit what was recorded; only needed where an exception that ended the training was caught."""
        self._session.end()
