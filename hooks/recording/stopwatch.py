"""What recording takes: wall and CPU time inside `with` blocks."""

import time
from collections.abc import Callable


class Stopwatch:
    """Adds up the wall and CPU time spent inside its `with` blocks; nested blocks count once. Of one thread: another one may only read it."""

    def __init__(self, cpu: Callable[[], float] | None = None) -> None:
        """`cpu` tells CPU time: by default of the whole process, `time.thread_time` of the calling thread alone."""
        self._cpu_time = cpu or time.process_time
        self._depth = 0
        self._wall = self._cpu = 0.0  # of finished blocks
        self._begun = (0.0, 0.0)

    def __enter__(self) -> "Stopwatch":
        if self._depth == 0:
            self._begun = (time.perf_counter(), self._cpu_time())
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._wall += time.perf_counter() - self._begun[0]
            self._cpu += self._cpu_time() - self._begun[1]

    def end(self) -> None:
        """End a block whose own end an exception of a signal handler has cut off; nothing is done where there is none."""
        if self._depth:
            self._depth = 1
            self.__exit__()

    @property
    def wall(self) -> float:
        """Seconds, the block under way included."""
        return self._wall + (time.perf_counter() - self._begun[0] if self._depth else 0.0)

    @property
    def cpu(self) -> float:
        """Seconds of CPU, the block under way included, which is to be of the calling thread."""
        return self._cpu + (self._cpu_time() - self._begun[1] if self._depth else 0.0)

    @property
    def finished_cpu(self) -> float:
        """Seconds of CPU of the blocks that have ended, for another thread to read."""
        return self._cpu
