"""As much of tensorboardX as a script that logs sees."""

from .writer import SummaryWriter

__all__ = ["SummaryWriter"]
