"""What becomes of a recorder of this process that is still open on a run when `attach` is called for that run again."""

import logging
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch.optim import Optimizer

from .observing.matrices import Matrix
from .observing.watched import Watched
from .recorder import Recorder
from .recording.lifetime import writing_to

log = logging.getLogger("optiscope")

# Made by `diag run`, whose script knows nothing of it: they give way to one that the script makes itself.
yielding: "weakref.WeakSet[Recorder]" = weakref.WeakSet()


def left_behind(store: Path, watched: Sequence[Watched], matrices: Iterable[Matrix]) -> list[Recorder]:
    """The open recorders of the run at `store` that belong to an earlier training, as when a notebook's cell is run again: they are to be closed.

    Such a recorder watches matrices of the same names under the same optimizers, in other parameters than those of `watched`. Any other goes on
    recording what it watches, and a second one would only cut it off. Nothing is closed here.

    Raises:
        ValueError: there is one of those.
    """
    parameters, own = _parameters(watched), _keys(matrices)
    found = writing_to(store)
    for recorder in found:
        others = _keys(m for one in recorder.watched for m in one.matrices)
        if recorder in yielding:
            continue
        if parameters & _parameters(recorder.watched) or not (own <= others or others <= own):
            raise ValueError(
                f"store: {store} is being recorded by a recorder that is still open and watches {_labels(recorder)}; pass all optimizers to one "
                "attach, add to it with its watch(optimizer), close it first, or record to another path"
            )
    return found


def close(recorders: Iterable[Recorder]) -> None:
    """Commit what they hold and let go of it, and say so."""
    for recorder in recorders:
        labels, step = _labels(recorder), recorder.step
        recorder.close(compact=False)
        why = (
            "the script records by itself"
            if recorder in yielding
            else "the same matrices are recorded anew, of other parameters, as when a cell is run again"
        )
        log.warning("optiscope: the recorder of %s that was still open on %s, at step %d, is closed: %s", labels, recorder.store, step, why)


def records_any_of(recorder: Recorder, optimizers: Iterable[Optimizer]) -> bool:
    """Whether it watches a parameter of one of these optimizers."""
    return bool(_parameters(recorder.watched) & {id(p) for one in optimizers for group in one.param_groups for p in group["params"]})


def _labels(recorder: Recorder) -> str:
    return ", ".join(one.label for one in recorder.watched)


def _parameters(watched: Iterable[Watched]) -> set[int]:
    return {id(p) for one in watched for layer in one.layers for group in layer.param_groups for p in group["params"]}


def _keys(matrices: Iterable[Matrix]) -> set[tuple[str, str, int, int]]:
    """What tells them apart in the store, of those that are a parameter's own."""
    return {(m.optimizer, m.name, m.rows, m.cols) for m in matrices if not m.members}
