"""As much of mlflow as a script that logs sees."""

from .tracking.fluent import log_metric, log_metrics

__all__ = ["log_metric", "log_metrics"]
