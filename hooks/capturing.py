"""Whether a CUDA graph is being captured: reading anything then would break the capture."""

import torch


def capturing() -> bool:
    """Whether the current stream is being captured into a graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
