"""A thread beside the training that does the recorder's work in order, so that the training does not wait for it."""

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue


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
        self._tasks: SimpleQueue[Callable[[], None] | threading.Event | None] = SimpleQueue()
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
            # A daemon, so that nothing but `Recorder.close`, which waits, decides how long a process that ends waits for it.
            self._thread = threading.Thread(target=self._run, name="optiscope", daemon=True)
            self._thread.start()
        self._given += 1
        self._tasks.put(task)

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
            self._tasks.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            if isinstance(task, threading.Event):
                task.set()
                continue
            try:
                task()
            except BaseException as error:  # whoever waits for this thread must not wait for ever
                self.error = self.error or error
            self._done += 1
            del task  # and the copies that it holds, which may be of a whole model
