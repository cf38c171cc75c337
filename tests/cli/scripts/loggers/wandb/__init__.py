"""As much of wandb as a script that logs sees: `log` is refused before `init`, and is a run's own method from then on."""

from .sdk.wandb_run import Run


def _before_init(*args, **kwargs):
    raise RuntimeError("You must call wandb.init() before wandb.log()")


log = _before_init


def init(**settings):
    global run, log
    run = Run()
    log = run.log
    return run


class Image:
    def __init__(self, data):
        self.data = data
