"""The command line: `diag`."""

from .app import app

__all__ = ["app"]
