"""The line every benchmark prints first: on what its numbers were measured."""

import os
import platform

import numpy as np
import torch


def machine() -> str:
    """CPUs, versions and threads. NumPy's BLAS has threads of its own; OMP_NUM_THREADS limits both."""
    return (
        f"machine: {os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"{torch.get_num_threads()} torch threads, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}"
    )
