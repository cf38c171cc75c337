"""The roll call: which ranks attach a recorder to one run, and what each of them says, before anybody waits for another."""

import itertools
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

_LOOK_SECONDS = 0.02

_VERDICT = "present"  # the key under which the ranks are that were here

# The calls of this process: all ranks make the same ones in the same order, and each has keys of its own.
_calls = itertools.count()


@dataclass(frozen=True)
class RollCall:
    """The ranks that answered, and what each says.

    Attributes:
        rank, size: of this process, among all of the training.
        answers: by rank.
        board: a key-value store that all ranks reach, for what follows.
    """

    rank: int
    size: int
    answers: dict[int, bytes]
    board: Any

    @property
    def missing(self) -> list[int]:
        """Ranks that did not answer."""
        return [rank for rank in range(self.size) if rank not in self.answers]

    def say(self, key: str, words: bytes) -> None:
        """Put something on the board."""
        self.board.set(key, words)

    def hear(self, key: str, timeout: float) -> bytes | None:
        """What rank 0 put there; None where it did not in time, or has given the roll call up meanwhile."""
        return _read(self.board, key) if _wait(self.board, [key], timeout, while_there="0") else None


def processes() -> tuple[int, int]:
    """Rank and number of the processes of this training; 0 and 1 where torch.distributed is not in use."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def call_roll(own: bytes, timeout: float) -> RollCall:
    """Say what this rank has to say, and hear the others, for up to `timeout` seconds.

    Through the key-value store that torch.distributed was set up with: no collective, so that a rank that never comes holds nobody up for longer.
    """
    rank, size = processes()
    # Within: a torch built without them has no processes either.
    from torch._C._distributed_c10d import HashStore, PrefixStore
    from torch.distributed.distributed_c10d import _get_default_store

    if size == 1:
        return RollCall(0, 1, {0: own}, HashStore())
    board: Any = PrefixStore(f"optiscope/{next(_calls)}", _get_default_store())
    found = {rank: own}
    # A store that is gone (its process has ended) or keeps nothing (a group that only pretends to be one) answers for nobody.
    with suppress(RuntimeError):
        while board.check([_VERDICT]):  # of others, who have waited in vain: from the next one on all count alike again
            board = PrefixStore(f"optiscope/{next(_calls)}", _get_default_store())
        board.set(str(rank), own)
        _wait(board, [str(other) for other in range(size)], timeout)
        # The first who is done waiting decides who was here: one that comes just then must not count itself in while others have given it up.
        present = ",".join(str(other) for other in range(size) if board.check([str(other)]))
        decided = bytes(board.compare_set(_VERDICT, "", present)).decode()
        found = {other: _read(board, str(other)) for other in map(int, decided.split(","))}
    return RollCall(rank, size, found, board)


def _read(board: Any, key: str) -> bytes:
    return bytes(board.get(key))


def _wait(board: Any, keys: list[str], timeout: float, while_there: str | None = None) -> bool:
    """Whether all keys are there, in time, and while another one is. By looking again and again: a store that waits answers no other thread of the process."""
    end = time.monotonic() + timeout
    while not board.check(keys):
        if time.monotonic() > end or (while_there is not None and not board.check([while_there])):
            return False
        time.sleep(_LOOK_SECONDS)
    return True
