"""Processes that train together, kept for many tests: each joins a gloo group once, and is then given functions to call on every rank."""

import logging
import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path


class Log(logging.Handler):
    """What was said as a warning or worse."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())

    def __enter__(self):
        logging.getLogger("optiscope").addHandler(self)
        return self

    def __exit__(self, *_):
        logging.getLogger("optiscope").removeHandler(self)


class Pool:
    """`size` ranks. A function that it is given is one of a test module, and is called as function(rank, size, *arguments) on all of them."""

    def __init__(self, size):
        context = multiprocessing.get_context("spawn")
        self._meeting = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        self.is_open = True
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, self._meeting.name, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def call(self, function, *arguments, timeout=180, answer_of=None):
        """What every rank returns, in order, or what one does, where others are to end. Raises what one of them raised, with its traceback as text."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if answer_of not in (None, rank):
                continue
            if not pipe.poll(timeout):
                self.close()
                raise AssertionError(f"rank {rank} does not come back from {function.__name__}")
            answers.append(pipe.recv())
        for rank, (error, _) in enumerate(answers):
            assert error is None, f"rank {rank}:\n{error}"
        return [answer for _, answer in answers] if answer_of is None else answers[0][1]

    def close(self):
        """End the processes."""
        self.is_open = False
        for process in self._processes:
            process.kill()
            process.join()
        self._meeting.cleanup()


def _serve(rank, size, meeting, pipe):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{Path(meeting) / 'store'}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    # What is slow to import is imported before ranks wait for each other.
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel

    while True:
        function, arguments = pipe.recv()
        dist.barrier()
        try:
            answer = None, function(rank, size, *arguments)
        except BaseException:
            answer = traceback.format_exc(), None
        pipe.send(answer)
