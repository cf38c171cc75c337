"""The start of a script's interpreter under `diag run`.

Its folder leads PYTHONPATH, so that Python imports this file as `sitecustomize` before it runs the script. It first undoes what brought
it here (the variables, the entry of `sys.path`, standing in for the environment's own `sitecustomize`), and then waits: when
the script imports torch's optimizers, a hook on their steps is registered, and at the first step recording begins.

All else is as under plain `python`, because it is plain `python`: no frame of ours below the script's, its `__main__` its own. Nothing is
imported here that the interpreter has not loaded anyway, for a script may set variables before it imports torch, and keep a module beside
it that is named like one of ours.
"""

import atexit
import os
import sys

TYPE_CHECKING = False  # typing is not loaded at this time
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

PREFIX = "OPTISCOPE_RUN_"
AWAITED = "torch.optim.optimizer"


class Start:
    """Waits on `sys.meta_path` for torch's optimizers, then at their steps, and tells at the end what came of it."""

    def __init__(self, store: str, options: str) -> None:
        self._store, self._options = store, options
        self._process = os.getpid()
        self._recording: Any = None
        self._hook: Any = None
        self._trouble: str | None = None

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "Any":
        """Find the awaited module as it would be found without us; once it is loaded, register the hook."""
        if name != AWAITED:
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(name)
        loader: Any = spec and spec.loader
        if loader is not None:

            def exec_module(module: "ModuleType") -> None:
                del loader.exec_module  # the class's own is seen again: the loader that stays with the module is untouched
                loader.exec_module(module)
                self._register(module)

            loader.exec_module = exec_module
        return spec

    def _register(self, module: "ModuleType") -> None:
        try:
            from torch._compile import _disable_dynamo

            # Of a function, not of a method: torch keeps something on it.
            self._hook = module.register_optimizer_step_pre_hook(_disable_dynamo(lambda *step: self._before_step(*step)))
        except Exception as error:
            self._give_up(error)

    def _before_step(self, optimizer: "Any", args: "Any", kwargs: "Any") -> None:
        # A forked child, a data loader's worker for one, is not what is recorded.
        if os.getpid() != self._process:
            return
        try:
            if self._recording is None:
                self._begin(optimizer)
            else:
                self._recording.before_step(optimizer)
        except Exception as error:
            self._give_up(error)

    def _begin(self, optimizer: "Any") -> None:
        import json
        import logging
        from importlib import import_module

        # A script may send all logging to its standard output, which is to stay its own. What it uses itself is left to it.
        for name in ("optiscope", *(name for name in ("zarr", "numcodecs", "filelock") if name not in sys.modules)):
            logger = logging.getLogger(name)
            logger.addHandler(logging.StreamHandler(sys.__stderr__))
            logger.setLevel(logging.WARNING)
            logger.propagate = False
        asyncio = logging.getLogger("asyncio")  # tells of the event loop that Zarr makes
        level = asyncio.level
        asyncio.setLevel(logging.WARNING)
        try:
            options = import_module("optiscope.diagnostics.options").Options(**json.loads(self._options))
            self._recording = import_module("optiscope.hooks.trainers.script_run").ScriptRun(self._store, options)
            self._recording.before_step(optimizer)
            import_module("zarr").create_group({})  # makes that loop now
        finally:
            asyncio.setLevel(level)

    def _give_up(self, error: Exception) -> None:
        """One sentence, and the training goes on; what is attached to already is still recorded."""
        self._trouble = f"{type(error).__name__}: {error}"
        self._detach()
        tell(f"no further optimizer is recorded ({self._trouble}); the script goes on")

    def _detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    def end(self) -> None:
        """At the interpreter's end: one line."""
        if os.getpid() != self._process:
            return
        self._detach()
        if self._recording is not None:
            self._recording.end()
            tell(self._recording.outcome)
        elif self._trouble is None:
            tell("nothing was recorded: no torch optimizer of this process, with a weight matrix among its parameters, took a step")


def tell(sentence: str) -> None:
    """One line on standard error, if there is one."""
    try:
        # As `diagnostics.escape` does, of which nothing is loaded yet.
        printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(sentence.split()))
        os.write(2, f"diag run: {printable}\n".encode())
    except OSError:
        pass


def start() -> None:
    """Undo what brought this file here, and wait for torch."""
    settings = {name.removeprefix(PREFIX): os.environ.pop(name) for name in list(os.environ) if name.startswith(PREFIX)}
    if "STORE" not in settings:
        return  # not started by `diag run`
    os.environ.pop("PYTHONPATH")
    if "PYTHONPATH" in settings:
        os.environ["PYTHONPATH"] = settings["PYTHONPATH"]
    folder = os.path.dirname(__file__)
    sys.path.remove(folder)
    sys.path_importer_cache.pop(folder, None)
    waiting = Start(settings["STORE"], settings.get("OPTIONS", "{}"))
    sys.meta_path.insert(0, waiting)
    atexit.register(waiting.end)
    _import_the_environments_own()


def _import_the_environments_own() -> None:
    this = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
        sys.modules["sitecustomize"] = this  # Python looks for it there when the import under way is done


if __name__ == "sitecustomize":
    start()
