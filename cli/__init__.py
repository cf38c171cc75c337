"""The command line: `diag`."""

# Importing a command registers it.
from . import analyze, check, compare, demo, info, ns, report, run_script, schedule, verify, what_if  # noqa: F401
from .app import app

__all__ = ["app"]
