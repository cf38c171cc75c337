"""The recording of one training, as the callback of a trainer sees it: its beginning, what is logged meanwhile, and its end."""

import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from ...diagnostics.options import Options
from ..attaching import as_list, attach
from ..guard import KeptOut
from ..ranks.joining import as_rank_0_says
from ..ranks.roll_call import processes
from ..recorder import Recorder
from ..recording.second_session import records_any_of

log = logging.getLogger("optiscope")

Place: TypeAlias = tuple[Path, int | None]  # a path, and the step from which a run there is continued

# All that have begun: a trainer that was interrupted, and made anew with another callback, tells nobody of its end.
_begun: "weakref.WeakSet[CallbackSession]" = weakref.WeakSet()


class CallbackSession:
    """Attaches for a callback, and keeps every trouble with that out of the training.

    A trainer may train again, after its end or after an exception that it told nobody of: `begin` closes what is open, of another
    callback too where that recorded the same parameters, and goes on after it. A `store` that cannot be continued (of another model, or being written by another process) is left as it is,
    and `run-2.zarr`, `run-3.zarr`, … beside it is recorded to instead.

    Attributes:
        store: where to record, as an absolute path.
        recorder: the present recorder, or the last one; None before the first training, and after `let_go`.
    """

    def __init__(self, store: str | Path, options: Options) -> None:
        """`store` and options as of :func:`attach`; a relative path is one of the present working folder, whatever that is when training begins."""
        self.recorder: Recorder | None = None
        self.store = Path(store).absolute()
        self._options = options
        self._steps: int | None = None  # of the training let go of last
        self._close: weakref.finalize[Any, Any] | None = None
        self._told: set[str] = set()

    def begin(
        self,
        optimizers: Optimizer | Iterable[Optimizer],
        model: nn.Module | None,
        steps_taken: int,
        places: Sequence[Place] | None = None,
    ) -> None:
        """Attach to `optimizers`, which have taken `steps_taken` steps, at the first of `places` that takes them. Where that fails, the training is not recorded."""
        self.let_go()
        self._told.clear()
        with self.guard("this training is not recorded"):
            optimizers = as_list(optimizers)
            for other in list(_begun):
                # Of two trainers only the later one trains the same parameters.
                if other.recorder is not None and other.store == self.store and records_any_of(other.recorder.session, optimizers):
                    other.end()
            _begun.add(self)
            places = places or self._places(steps_taken)
            if self._options.ranks != "alone":
                places = as_rank_0_says(places, self._options.rank_timeout)  # which alone knows what is at these paths
            self.recorder = recorder = self._attach(optimizers, model, places)
            # An open recorder holds the model, for ever if a training failed and its trainer was thrown away: it is closed
            # with the callback. The interpreter's end is looked after by the recorder itself.
            self._close = weakref.finalize(self, recorder.close)
            self._close.atexit = False

    def takes_part(self, is_main: bool) -> bool:
        """Whether a process is to begin: the main one, and where several train together and are to record together, all of them."""
        return is_main or (self._options.ranks != "alone" and processes()[1] > 1)

    def _places(self, steps_taken: int) -> list[Place]:
        """The last run that there is, and a path beside it."""
        existing, free = existing_and_free(self.store)
        # A trainer that trains anew counts from 0; the run goes on after what it holds.
        return [*((last, steps_taken or self._steps) for last in existing[-1:]), (free, steps_taken)]

    def _attach(self, optimizers: Optimizer | Iterable[Optimizer], model: nn.Module | None, places: Sequence[Place]) -> Recorder:
        refused: tuple[Path, ValueError] | None = None
        for i, (path, first_step) in enumerate(places):
            try:
                recorder = attach(optimizers, model, path, first_step=first_step, **vars(self._options))
            except ValueError as error:
                if i == len(places) - 1:
                    raise
                # Where it was not the store that was refused, the same error comes again.
                refused = refused or (path, error)
            else:
                break
        if refused is not None:
            log.warning("optiscope: recording to %s, because %s cannot be continued (%s)", path, refused[0], str(refused[1]))
        return recorder

    def log(self, values: Mapping[str, Any]) -> None:
        """Log the numbers among `values`; those that a trainer reports after its end are added to the last step."""
        if self.recorder is not None:
            with self.guard("numbers of the trainer were not logged"):
                self.recorder.log(**{name: value for name, value in values.items() if _is_number(value)})

    def guard(self, trouble: str) -> KeptOut:
        """Logs an exception of the block, once per kind of trouble, and lets the training go on; raises it with `on_error="raise"`."""

        def tell(error: Exception) -> None:
            if trouble not in self._told:
                self._told.add(trouble)
                log.warning("optiscope: %s (%s: %s)", trouble, type(error).__name__, error)

        return KeptOut(tell, raising=self._options.on_error == "raise")

    def flush(self) -> None:
        """Commit what was recorded."""
        if self.recorder is not None:
            self.recorder.flush()

    def end(self) -> None:
        """Detach, and commit what was recorded. Ending twice is harmless."""
        if self._close is not None:
            self._close()

    def let_go(self) -> None:
        """End, and hold nothing of the training any more, whose memory its owner may want back."""
        self.end()
        if self.recorder is not None:
            self._steps, self.recorder = self.recorder.step, None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)


def existing_and_free(store: Path) -> tuple[list[Path], Path]:
    """Those of run.zarr, run-2.zarr, run-3.zarr, … that exist, up to the first that does not, and that one."""
    existing, path = [], store
    while path.exists():
        existing.append(path)
        path = store.with_name(f"{store.stem}-{len(existing) + 1}{store.suffix}")
    return existing, path
