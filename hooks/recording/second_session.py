"""What becomes of a recorder of this process that is still open on a run when `attach` is called for that run again."""

import logging
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch.optim import Optimizer

from ..observing.matrix import Matrix
from ..observing.watched import Watched
from .lifetime import Open, writing_to

log = logging.getLogger("optiscope")

# Made by `diag run`, whose script knows nothing of it: they give way to one that the script makes itself.
yielding: "weakref.WeakSet[Open]" = weakref.WeakSet()


def left_behind(store: Path, watched: Sequence[Watched], matrices: Iterable[Matrix]) -> list[Open]:
    """The open recorders of the run at `store` that belong to an earlier training, as when a notebook's cell is run again: they are to be closed.

    Such a recorder watches matrices of the same names under the same optimizers, in other parameters than those of `watched`. Any other goes on
    recording what it watches, and a second one would only cut it off. Nothing is closed here.

    Raises:
        ValueError: there is one of those.
    """
    parameters, own = _parameters(watched), _keys(matrices)
    found = writing_to(store)
    for recording in found:
        others = _keys(m for one in recording.watched for m in one.matrices)
        if recording in yielding:
            continue
        if parameters & _parameters(recording.watched) or not (own <= others or others <= own):
            raise ValueError(
                f"store: {store} is being recorded by a recorder that is still open and watches {_labels(recording)}; pass all optimizers to one "
                "attach, add to it with its watch(optimizer), close it first, or record to another path"
            )
    return found


def close(recordings: Iterable[Open]) -> None:
    """Commit what they hold and let go of it, and say so."""
    for recording in recordings:
        labels, step = _labels(recording), recording.step
        recording.close(compact=False)
        why = (
            "the script records by itself"
            if recording in yielding
            else "the same matrices are recorded anew, of other parameters, as when a cell is run again"
        )
        log.warning(
            "optiscope: the recorder of %s that was still open on %s, at step %d, is closed: %s", labels, recording.store, step, why
        )


def records_any_of(recording: Open, optimizers: Iterable[Optimizer]) -> bool:
    """Whether it watches a parameter of one of these optimizers."""
    return bool(_parameters(recording.watched) & {id(p) for one in optimizers for group in one.param_groups for p in group["params"]})


def _labels(recording: Open) -> str:
    return ", ".join(one.label for one in recording.watched)


def _parameters(watched: Iterable[Watched]) -> set[int]:
    return {id(p) for one in watched for layer in one.layers for group in layer.param_groups for p in group["params"]}


def _keys(matrices: Iterable[Matrix]) -> set[tuple[str, str, int, int]]:
    """What tells them apart in the store, of those that are a parameter's own."""
    return {(m.optimizer, m.name, m.rows, m.cols) for m in matrices if not m.members}
