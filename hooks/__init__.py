"""Attaching to a training: recording its optimizers, and putting schedules into force."""

from ..diagnostics.quantities.problem import NewtonSchulz
from .acting.adaptive_schedule import AdaptiveSchedule
from .acting.applying import apply_schedule
from .acting.rms_guard import RmsAlignment
from .adapters import Adapter, Orthogonalisation, Reading, SecondMoment, register_adapter
from .attaching import attach
from .log_anywhere import log
from .recorder import Recorder

__all__ = [
    "Adapter",
    "AdaptiveSchedule",
    "NewtonSchulz",
    "Orthogonalisation",
    "Reading",
    "Recorder",
    "RmsAlignment",
    "SecondMoment",
    "apply_schedule",
    "attach",
    "log",
    "register_adapter",
]
