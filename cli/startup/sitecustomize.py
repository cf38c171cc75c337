"""The start of a script's interpreter under `diag run`.

Its folder leads PYTHONPATH, so that Python imports this file as `sitecustomize` before it runs the script. It first undoes what brought
it here (the variables, the entry of `sys.path`, standing in for the environment's own `sitecustomize`), and then waits: when
the script imports torch's optimizers, a hook on their steps is registered, and at the first step recording begins. When it imports a library that
logs numbers, the functions that do so are wrapped: after each call its numbers are taken over.

All else is as under plain `python`, because it is plain `python`: no frame of ours below the script's, its `__main__` its own. Nothing is
imported here that the interpreter has not loaded anyway, for a script may set variables before it imports torch, and keep a module beside
it that is named like one of ours.
"""

import atexit
import os
import sys

TYPE_CHECKING = False  # typing is not loaded at this time
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType
    from typing import Any

PREFIX = "OPTISCOPE_RUN_"
OPTIMIZERS = "torch.optim.optimizer"
OWN_LOG = "optiscope.hooks.log_anywhere"
# Modules that define what scripts log with: the class ("": the module itself), its function, and the parameters that hold a name, where there is
# one, and the numbers. Where they are defined, and not where scripts import them from: there they may be bound by then (`wandb.log` is a run's own).
WRITER = (("SummaryWriter", "add_scalar", ("tag", "scalar_value")), ("SummaryWriter", "add_scalars", ("main_tag", "tag_scalar_dict")))
LIBRARIES: "dict[str, tuple[tuple[str, str, tuple[str, ...]], ...]]" = {
    "wandb.sdk.wandb_run": (("Run", "log", ("data",)),),
    "torch.utils.tensorboard.writer": WRITER,
    "tensorboardX.writer": WRITER,
    "mlflow.tracking.fluent": (("", "log_metric", ("key", "value")), ("", "log_metrics", ("metrics",))),
}


class Awaited:
    """Waits on `sys.meta_path` for modules, and calls `loaded` with each once it is there."""

    def __init__(self, loaded: "Callable[[ModuleType], object]", *names: str) -> None:
        self._loaded, self._names = loaded, set(names)

    def wait(self) -> None:
        """Begin to."""
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "Any":
        """Find an awaited module as it would be found without us."""
        if name not in self._names:
            return None
        self._names.remove(name)
        if not self._names:
            self.stop()
        from importlib.util import find_spec

        spec = find_spec(name)
        loader: Any = spec and spec.loader
        if loader is not None:

            def exec_module(module: "ModuleType") -> None:
                del loader.exec_module  # the class's own is seen again: the loader that stays with the module is untouched
                loader.exec_module(module)
                self._loaded(module)

            loader.exec_module = exec_module
        return spec

    def stop(self) -> None:
        """Wait no more. Stopping twice is harmless."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)


class Logged:
    """Numbers that the script logs by itself: handed to the recording, and kept until there is one.

    Attributes:
        recording: what takes them, by its `log` and `take_over`; None before the first step.
    """

    def __init__(self) -> None:
        self.recording: Any = None
        self._process = os.getpid()
        self._kept: dict[str, dict[str, Any]] = {"log": {}, "take_over": {}}
        self._wrapped: list[tuple[Any, str, Any, Any]] = []  # owner, name, what it was, what it is now
        self._awaited = Awaited(self._loaded, OWN_LOG, *LIBRARIES)

    def wait(self) -> None:
        """Wait for the libraries to be imported."""
        self._awaited.wait()

    def begin(self, recording: "Any") -> None:
        """Hand over what was kept, and all that comes."""
        self.recording = recording
        for how, values in self._kept.items():
            if values:
                getattr(recording, how)(values)
        self._kept.clear()

    def end(self) -> None:
        """Put the libraries' functions back. Ending twice is harmless."""
        self._awaited.stop()
        self._kept = {"log": {}, "take_over": {}}
        for owner, name, former, ours in self._wrapped:
            if vars(owner).get(name) is ours:
                setattr(owner, name, former)

    def _loaded(self, module: "ModuleType") -> None:
        try:
            if module.__name__ == OWN_LOG:
                module.keep_with(self._own)
            for kind, name, parameters in LIBRARIES.get(module.__name__, ()):
                self._wrap(getattr(module, kind) if kind else module, name, parameters)
        except Exception as error:  # a version that is made otherwise
            tell(f"numbers that the script logs with {module.__name__} are not recorded ({type(error).__name__}: {error})")

    def _wrap(self, owner: "Any", name: str, parameters: tuple[str, ...]) -> None:
        from functools import wraps

        former = vars(owner)[name]
        first = 1 if isinstance(owner, type) else 0  # after self

        @wraps(former)
        def call(*args: "Any", **kwargs: "Any") -> "Any":
            result = former(*args, **kwargs)
            if os.getpid() == self._process and (numbers := numbers_of_call(parameters, args[first:], kwargs)):
                self._give("take_over", numbers)
            return result

        setattr(owner, name, call)
        self._wrapped.append((owner, name, former, call))

    def _own(self, scalars: "Mapping[str, Any]") -> None:
        """Takes what the script gives to our own `log`: a tensor's number at once, as the tensor may change."""
        if os.getpid() == self._process:
            self._give("log", {name: value if (number := number_of(value)) is None else number for name, value in scalars.items()})

    def _give(self, how: str, values: dict[str, "Any"]) -> None:
        if self.recording is None:
            self._kept[how].update(values)
        else:
            getattr(self.recording, how)(values)


def numbers_of_call(parameters: tuple[str, ...], args: "tuple[Any, ...]", kwargs: "dict[str, Any]") -> dict[str, float]:
    """The numbers of a call that logs, by name: names of a mapping within another one are joined by slashes; all that is no number is left out."""
    found: dict[str, float] = {}
    try:
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        *names, values = (given[name] for name in parameters)
        _collect(found, "/".join(map(str, names)), values)
    except Exception:
        pass  # whatever it was, the library has taken it
    return found


def _collect(found: dict[str, float], name: str, value: "Any") -> None:
    if isinstance(value, dict):
        for key, inner in list(value.items()):
            _collect(found, f"{name}/{key}" if name else str(key), inner)
    elif (number := number_of(value)) is not None:
        found[name] = number


def number_of(value: "Any") -> float | None:
    """A Python number, or the one number of a tensor or an array; None for anything else."""
    try:
        if not isinstance(value, (int, float)) and hasattr(value, "item") and tuple(value.shape) in ((), (1,)):
            value = value.item()
        return value if isinstance(value, (int, float)) else None
    except Exception:
        return None


class Start:
    """Waits for torch's optimizers, then at their steps, and tells at the end what came of it."""

    def __init__(self, store: str, options: str) -> None:
        self._store, self._options = store, options
        self._process = os.getpid()
        self._recording: Any = None
        self._hook: Any = None
        self._trouble: str | None = None
        self._logged = Logged()

    def wait(self) -> None:
        """Wait for the optimizers, and for what logs."""
        self._logged.wait()
        Awaited(self._register, OPTIMIZERS).wait()

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
            self._logged.begin(self._recording)
            self._recording.before_step(optimizer)
            import_module("zarr").create_group({})  # makes that loop now
        finally:
            asyncio.setLevel(level)

    def _give_up(self, error: Exception) -> None:
        """One sentence, and the training goes on; what is attached to already is still recorded."""
        self._trouble = f"{type(error).__name__}: {error}"
        self._detach()
        if self._recording is None:
            self._logged.end()  # nothing is going to take it
        tell(f"no further optimizer is recorded ({self._trouble}); the script goes on")

    def _detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    def end(self) -> None:
        """At the interpreter's end: one line."""
        if os.getpid() != self._process:
            return
        self._detach()
        self._logged.end()
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
    waiting.wait()
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
