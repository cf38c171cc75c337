"""Attaching to a training: recording its optimizers, and putting schedules into force."""

from .adapters import Adapter, Orthogonalisation, Reading, SecondMoment, register_adapter
from .adaptive_schedule import AdaptiveSchedule
from .applying import apply_schedule
from .attaching import attach
from .recorder import Recorder
from .rms_alignment import RmsAlignment

__all__ = [
    "Adapter",
    "AdaptiveSchedule",
    "Orthogonalisation",
    "Reading",
    "Recorder",
    "RmsAlignment",
    "SecondMoment",
    "apply_schedule",
    "attach",
    "register_adapter",
]
