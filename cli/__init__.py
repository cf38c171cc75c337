"""The command line: `diag`."""

# Importing a command registers it; help lists them in this order.
from . import analyze, check, compare, demo, info, ns, report, run_script, schedule, verify  # noqa: F401
from .app import app

__all__ = ["app"]
