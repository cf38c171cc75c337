"""A thread beside the training that does the recorder's work in order, so that the training does not wait for it."""

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeAlias

Tasks: TypeAlias = "SimpleQueue[Callable[[], None] | threading.Event | None]"


class Worker:
    """Runs what it is given, one after the other, in one thread of its own; :attr:`busy` until all is done.

    Only one thread gives it work, and that thread may do the like itself while the worker is idle. There is no lock that both take:
    whoever gives work never waits, but in :meth:`wait` and :meth:`stop`. In a forked child there is no such thread; there everything
    here does nothing.

    Attributes:
        error: what a task raised first, until somebody takes it.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._tasks: Tasks = SimpleQueue()
        self._given = self._done = 0  # each counted by one thread
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    @property
    def busy(self) -> bool:
        """Whether something is still to be done."""
        return self._given != self._done

    def is_current(self) -> bool:
        """Whether the caller is the worker's own thread."""
        return threading.current_thread() is self._thread

    def submit(self, task: Callable[[], None]) -> None:
        """Have something done after all that was given before."""
        if os.getpid() != self._process:
            return
        if self._thread is None:
            self._begin()
        self._given += 1
        self._tasks.put(task)

    def _begin(self) -> None:
        # Tasks of its own, and known only once it runs: where an exception of a signal handler cuts this off, nobody waits for a thread
        # that never began, and one that did has nothing to do.
        tasks: Tasks = SimpleQueue()
        # A daemon, so that nothing but `Recorder.close`, which waits, decides how long a process that ends waits for it.
        thread = threading.Thread(target=self._run, args=(tasks,), name="optiscope", daemon=True)
        try:
            thread.start()
        except BaseException:
            tasks.put(None)
            raise
        self._tasks, self._thread = tasks, thread

    def wait(self) -> None:
        """Wait until all is done."""
        if self.busy and os.getpid() == self._process:
            reached = threading.Event()
            self._tasks.put(reached)
            reached.wait()

    def stop(self) -> None:
        """End the thread after what it was given, and wait for that. More work would begin another."""
        self.wait()  # not by `join`, which does not wait a second time when an exception has interrupted it
        if self._thread is not None and os.getpid() == self._process:
            thread, self._thread = self._thread, None  # first: where the wait is cut off, nothing is given to a thread that has ended
            self._tasks.put(None)
            thread.join()

    def _run(self, tasks: Tasks) -> None:
        while (task := tasks.get()) is not None:
            if isinstance(task, threading.Event):
                task.set()
                continue
            try:
                task()
            except BaseException as error:  # whoever waits for this thread must not wait for ever
                self.error = self.error or error
            self._done += 1
            del task  # and the copies that it holds, which may be of a whole model
