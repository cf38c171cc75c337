"""Attaching to a training: recording its optimizers, and putting schedules into force."""

from .adapters import Adapter, Orthogonalisation, Reading, SecondMoment, register_adapter
from .applying import apply_schedule
from .attaching import attach
from .recorder import Recorder

__all__ = ["Adapter", "Orthogonalisation", "Reading", "Recorder", "SecondMoment", "apply_schedule", "attach", "register_adapter"]
