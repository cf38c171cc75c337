"""Finding what a script trains among the objects that are alive: its optimizers, and the modules that own their parameters."""

import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Several(nn.Module):
    """Modules under one roof, for their names alone: each under its name among the script's globals, or else that of its class, numbered where it occurs twice."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        names = [global_name(module) or type(module).__name__ for module in modules]
        for i, (name, module) in enumerate(zip(names, modules, strict=True)):
            count = names[:i].count(name) + 1
            self._modules[f"{name}{count}" if count > 1 else name] = module


def global_name(thing: object) -> str | None:
    """The first name by which the script (`__main__`) holds an object as a global; None where it holds it otherwise."""
    space = getattr(sys.modules.get("__main__"), "__dict__", {})
    return next((name for name, held in list(space.items()) if held is thing and name.isidentifier() and name[0] != "_"), None)


def live(kind: type[T]) -> list[T]:
    """Every object of a class, or of one derived from it, that the garbage collector knows."""
    # By its type and never by isinstance, which asks the object for its class: proxies answer by loading or computing something.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]


def owners(parameters: Iterable[Tensor]) -> list[nn.Module]:
    """The outermost modules that own the parameters, the one that owns most of them first.

    Of several that own the same ones it is the smallest. A parameter that is in no module has no owner.
    """
    wanted = {id(p) for p in parameters}
    modules = [module for module in live(nn.Module) if type(module) is not Several]
    inside = {id(child) for module in modules for child in _children(module)}
    holdings = [(module, set(map(id, parameters_of(module)))) for module in modules if id(module) not in inside]
    found: list[nn.Module] = []
    while wanted and holdings:
        module, held = max(holdings, key=lambda holding: (len(holding[1] & wanted), -len(holding[1])))
        if not held & wanted:
            break
        found.append(module)
        wanted -= held
    return found


def parameters_of(module: nn.Module) -> list[Tensor]:
    """The parameters of a module and of what is in it, each once, in the order of `module.parameters()`."""
    return list({id(p): p for m in _within(module, set()) for p in m.__dict__.get("_parameters", {}).values() if p is not None}.values())


# By the attributes themselves, not by `modules()` and `parameters()`: scripts override those, and nothing of theirs is to run here.


def _within(module: nn.Module, seen: set[int]) -> Iterator[nn.Module]:
    seen.add(id(module))
    yield module
    for child in _children(module):
        if id(child) not in seen:
            yield from _within(child, seen)


def _children(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.__dict__.get("_modules", {}).values() if child is not None]
