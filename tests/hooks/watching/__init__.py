"""Optimizers that the adapter table does not hold, read by watching their steps."""
