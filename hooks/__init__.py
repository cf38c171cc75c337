"""Attaching to a training: recording its optimizers, and putting schedules into force."""

from .muon_schedule import apply_schedule
from .recorder import Recorder, attach

__all__ = ["Recorder", "apply_schedule", "attach"]
