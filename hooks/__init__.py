"""Attaching to a training: recording its optimizers, and putting schedules into force."""

from .attaching import attach
from .muon_schedule import apply_schedule
from .recorder import Recorder

__all__ = ["Recorder", "apply_schedule", "attach"]
