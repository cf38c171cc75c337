"""What acts on a training that goes on asks of recorder, optimizer, model and window before it begins: what it lacks is said then, in a sentence."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ...diagnostics.operators import clean_name
from ..adapters import class_name
from ..observing.watched import Watched
from ..recorder import Recorder
from ..recording.session import Session


def session_of(recorder: Any) -> Session:
    """The recording that a recorder holds, which is to be open."""
    if not isinstance(recorder, Recorder):
        raise TypeError(f"recorder: expected what `attach` returned, got {type(recorder).__name__}")
    if not recorder.session.is_open:
        raise ValueError("recorder: expected one that is open, got one that is closed; attach again")
    return recorder.session


def watching(session: Session, optimizer: Any) -> Watched:
    """How the recorder watches the optimizer."""
    found = session.watching(optimizer)
    if found is None:
        watched = ", ".join(one.label for one in session.watched)
        raise ValueError(f"optimizer: the recorder watches {watched} and not this {type(optimizer).__name__}; attach to it")
    return found


def check_geometry(session: Session) -> None:
    """Raise ValueError where spectra are not recorded."""
    if "geometry" not in session.groups:
        raise ValueError(
            'recorder: a schedule is derived from the group "geometry", which it does not record; attach with it in measure=(…)'
        )


def known_to_orthogonalise(watched: Watched) -> bool:
    """Whether a group is known to orthogonalise, by the adapter table; False where the class is not in it.

    Raises:
        TypeError: it is, and none of its groups does.
    """
    found = any(watched.adapter(group).orthogonalisation for group in watched.optimizer.param_groups)
    if watched.in_table and not found:
        raise TypeError(
            f"optimizer: it is not known what {class_name(type(watched.optimizer))} orthogonalises, so nothing can be derived from its records; "
            "register an adapter for it, as docs/adapters.md shows"
        )
    return found


def check_model(watched: Watched, model: nn.Module) -> None:
    """Raise where none of the model's parameters is one of the matrices that are recorded."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    names = {id(p): clean_name(name) for name, p in model.named_parameters()}
    matrices = [m for m in watched.matrices if m.geometry and not m.members]
    # Slices of a parameter bear its name and a number.
    if not any(m.name.partition("[")[0] == names.get(id(m.parameter)) for m in matrices):
        first = matrices[0].name if matrices else "none"
        raise ValueError(
            f"model: none of its parameters is one of the matrices that are recorded of {watched.label} under its name (the first: {first}); "
            "pass the model that was attached"
        )


def whole_steps(name: str, given: Iterable[Any]) -> list[int]:
    """Steps as integers, none below 1."""
    steps = list(given)
    if not all(isinstance(step, (int, np.integer)) and not isinstance(step, bool) and step >= 1 for step in steps):
        raise ValueError(f"{name}: expected whole numbers of steps from 1 on, got {steps}")
    return [int(step) for step in steps]


def checked_window(session: Session, window: Sequence[int]) -> tuple[int, int]:
    """First and last step of a window that records can still fall into."""
    if len(window) != 2:
        raise ValueError(f"window: expected the first and the last step, got {window!r}")
    first, last = whole_steps("window", window)
    if first > last:
        raise ValueError(f"window: expected the first step before the last, got ({first}, {last})")
    # Where recording itself began within or after it, its beginning may come from a checkpoint.
    if session.first_step < first <= session.step:
        raise ValueError(f"window: begins at step {first}, and step {session.step} is taken already; let it begin later")
    if not session.cadence.may_fall_within(first, last):
        raise ValueError(f"window: no record falls into steps {first} to {last}; let it hold a multiple of the recorder's `every`")
    return first, last


def check_single_process(instead: str) -> None:
    """Raise ValueError where other processes train the same weights, with what to do `instead`."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError(f"recorder: one of several processes would change its optimizer alone, and their weights would part; {instead}")


def check_in_step(session: Session, choice: str) -> None:
    """Raise ValueError where records are heard of when they happen to be measured: a `choice` that acts on them would make the training depend on it."""
    if session.in_background:
        raise ValueError(
            f"recorder: measures in the background, so that with {choice}=True the training would depend on when a record happens to be ready; "
            f"attach with background=False, or use {choice}=False"
        )
