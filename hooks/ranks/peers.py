"""A process group of the recorder's own: bytes from every rank to every rank, and nothing of it shared with the training's groups."""

from collections.abc import Sequence
from datetime import timedelta
from hashlib import sha256
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Peers:
    """The ranks, in one thread's use.

    Made beside torch's registry of groups, which it leaves as it is: the names of the training's later groups do not change, and
    `destroy_process_group` does not end it.

    Attributes:
        rank: this one's number.
        size: how many there are.
        bytes_sent, exchanges: so far; bytes to other ranks.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        """Waits up to `timeout` seconds for the others to make theirs, and so long for each of their answers.

        Raises:
            RuntimeError: they did not.
        """
        self.rank, self.size = rank, size
        self.bytes_sent = self.exchanges = 0
        self._timeout = timeout
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout)) if size > 1 else None

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int], timeout: float | None = None) -> list[Tensor]:
        """Send `parts[i]`, bytes, to rank i, and receive `sizes[i]` bytes from it.

        Raises:
            RuntimeError: a rank has ended, or has not answered within the timeout.
        """
        if self.size == 1:
            return list(parts)
        group = self._group  # once: the other thread may leave meanwhile
        if group is None:
            raise RuntimeError("this rank has left the others")
        given = torch.cat([part.reshape(-1) for part in parts])
        received = torch.empty(sum(sizes), dtype=torch.uint8)
        lengths = [part.numel() for part in parts]
        work = group.alltoall_base(received, given, list(sizes), lengths, timedelta(seconds=timeout or self._timeout))
        work.wait()
        self.bytes_sent += sum(lengths) - lengths[self.rank]
        self.exchanges += 1
        return list(torch.split(received, list(sizes)))

    def share(self, numbers: Sequence[int], timeout: float | None = None) -> list[list[int]]:
        """What every rank says in as many whole numbers. Raises RuntimeError as :meth:`exchange` does."""
        own = torch.tensor(numbers, dtype=torch.int64).view(torch.uint8)
        every = self.exchange([own] * self.size, [own.numel()] * self.size, timeout)
        return [part.view(torch.int64).tolist() for part in every]

    def share_bytes(self, own: bytes, lengths: Sequence[int], timeout: float | None = None) -> list[bytes]:
        """What every rank says, of lengths that all know. Raises RuntimeError as :meth:`exchange` does."""
        every = self.exchange([as_bytes(own)] * self.size, lengths, timeout)
        return [part.numpy().tobytes() for part in every]

    def collect(self, own: bytes, lengths: Sequence[int], timeout: float | None = None) -> list[bytes]:
        """At rank 0 what every rank says, of lengths that all know; at others nothing. Raises RuntimeError as :meth:`exchange` does."""
        nothing = torch.empty(0, dtype=torch.uint8)
        parts = [as_bytes(own) if to == 0 else nothing for to in range(self.size)]
        every = self.exchange(parts, lengths if self.rank == 0 else [0] * self.size, timeout)
        return [part.numpy().tobytes() for part in every] if self.rank == 0 else []

    def leave(self) -> None:
        """Close the connections: whoever waits for this rank hears at once that it is gone."""
        self._group = None


def digest(data: bytes) -> int:
    """A number of 64 bits by which to tell bytes from others."""
    return int.from_bytes(sha256(data).digest()[:8], "big", signed=True)


def as_bytes(data: bytes) -> Tensor:
    """As a tensor."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
