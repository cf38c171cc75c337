"""Reading an accelerator without holding up the training: on a stream of its own, Gram matrices made where the matrix is.

Written for CUDA and tested on the CPU alone, where the same functions run: not yet measured on an accelerator.
`benchmarks/accelerator.py` prints what each way costs on a machine that has one.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class SideStream:
    """From where it is made, what :meth:`stream` encloses runs on a stream beside the training's, after what that had been given by then.

    On a CPU there is one stream, and this does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reached = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Work within runs beside the training; at the end the caller, and nobody else, waits for it, so that what it read may be freed."""
        if self._reached is None:
            yield
            return
        side = _side_stream(self._device)
        side.wait_event(self._reached)
        with torch.cuda.stream(side):
            try:
                yield
            finally:
                side.synchronize()


@cache
def _side_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def to_host(tensor: Tensor) -> NDArray[np.floating[Any]]:
    """The tensor's numbers on the CPU; bfloat16, which NumPy lacks, as float32. Of an accelerator they are there when `SideStream.stream` ends.

    On the CPU nothing is copied but bfloat16. From an accelerator copies go to pinned memory, one after the other without a wait.
    """
    return as_array(tensor, wait=tensor.device.type != "cuda")


def as_array(tensor: Tensor, *, wait: bool = True) -> NDArray[np.floating[Any]]:
    """The tensor's numbers on the CPU, without copying where it can; bfloat16, which NumPy lacks, as float32.

    Without `wait`, those of an accelerator are there when its stream has come so far.
    """
    tensor = tensor.detach()
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    array: NDArray[np.floating[Any]] = tensor.to("cpu", non_blocking=not wait).numpy()
    return array


def gram_of(matrix: Tensor) -> NDArray[np.float64] | None:
    """MMᵀ in float64, the short side first, where an accelerator makes it, or its eigenvalues ascending; None where the CPU is to.

    Which of the two is asked once per device and size: whichever was quicker there, `torch.linalg.eigvalsh` or NumPy's on the CPU.
    Of float64 matrices, whose squares may leave float64, the CPU makes it.
    """
    if matrix.device.type != "cuda" or matrix.dtype == torch.float64:
        return None
    gram = gram_matrix(matrix)
    try:
        found = torch.linalg.eigvalsh(gram) if eigenvalues_there(gram.device, len(gram)) else gram
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None  # of what is not finite, which the CPU tells
    return np.asarray(to_host(found), dtype=np.float64)


def gram_matrix(matrix: Tensor) -> Tensor:
    """MMᵀ of the short side in float64, of a matrix of a narrower format, on its device."""
    wide = matrix.detach().double()
    return wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide


@cache
def eigenvalues_there(device: torch.device, size: int) -> bool:
    """Whether the eigenvalues of a symmetric matrix of this size take the device less time than copying it and NumPy take the CPU."""
    random = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = (random @ random.T).to(device)

    def there() -> object:
        return torch.linalg.eigvalsh(gram).cpu()

    def here() -> object:
        return np.linalg.eigvalsh(gram.cpu().numpy())

    return _seconds(there) < _seconds(here)


def _seconds(call: Callable[[], object]) -> float:
    """Of a second call: a first one loads libraries."""
    call()
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
