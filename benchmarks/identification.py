"""How often names, and how often numbers, find the moments of an optimizer that Optiscope does not know.

    python benchmarks/identification.py

Every optimizer of torch.optim and pytorch_optimizer, and some of heavyball, takes the first steps of training a small Llama, as many as a
recorder looks at. Then both moments are looked for twice: as in a recording of an unknown class, by names held against numbers, and blindly,
every key of the state replaced by a number, so that the gradients alone must tell. Where blind and named differ, the line says so. "-" is none
found; "misled by" lists names that the numbers, or the tensor's shape, contradict. Optimizers with neither are not listed.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from machine import machine
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from optiscope.examples.byte_llama import ByteLlama, Config, batches, language_reference
from optiscope.hooks.adapters.identification import FIRST_MOMENT, SECOND_MOMENT, STEPS, Looked, Moment, Verdict
from optiscope.hooks.adapters.likeness import Probe
from optiscope.hooks.adapters.names import spelled, tensors_in

CONFIG = Config(d=32, layers=1, heads=2, kv_heads=1, inner=48, sequence=32, batch=8)
HEAVYBALL = ("AdamW", "ADOPT", "LaProp", "Muon", "NAdam", "PSGDKron", "SGD", "SOAP")

# What plain defaults do not say.
USE_MUON = ("AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon")  # groups are marked use_muon
SECOND_ORDER = ("AdaHessian", "SophiaH")  # backward(create_graph=True)
CLOSURES = ("AliG", "LBFGS")


def optimizers() -> Iterator[tuple[str, Any]]:
    """Names and classes of all."""
    for name, cls in vars(torch.optim).items():
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer:
            yield f"torch {name}", cls
    library = import_module("pytorch_optimizer")
    for cls in sorted(map(library.load_optimizer, library.get_supported_optimizers()), key=lambda cls: cls.__name__):
        yield f"po {cls.__name__}", cls
    heavyball = import_module("heavyball")
    heavyball.utils.compile_mode = None
    yield from ((f"heavyball {name}", getattr(heavyball, name)) for name in HEAVYBALL)


def looked_at(cls: Any, text: Tensor) -> list[Looked]:
    """Averages of the gradients of four matrices, and the state after the last step."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = ByteLlama(CONFIG)
    weights = [p for p in model.layers.parameters() if p.ndim == 2]
    settings = {"lr": 1e-3} if "lr" in inspect.signature(cls).parameters else {}
    optimizer = cls(
        [{"params": weights, "use_muon": True}] if cls.__name__ in USE_MUON and cls is not torch.optim.Muon else weights, **settings
    )
    getattr(optimizer, "train", lambda: None)()
    probes = [Probe(p) for p in sorted(weights, key=torch.numel)[:4]]

    def closure() -> float:
        optimizer.zero_grad()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative on the CPU
            loss: Tensor = model(*batch)
            loss.backward(create_graph=cls.__name__ in SECOND_ORDER)
        for probe in probes:
            gradient = probe.parameter.grad
            assert gradient is not None
            probe.coming = gradient.detach().clone()
        return loss.item()

    for _ in range(STEPS):
        batch = batches(text, CONFIG, generator)
        if cls.__name__ in CLOSURES:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        for probe in probes:
            probe.add()
    return [(probe, tensors_in(optimizer.state.get(probe.parameter) or {})) for probe in probes]


def blindly(looked: list[Looked]) -> tuple[list[Looked], dict[Any, str]]:
    """The same with numbers for names, in an order that has nothing to do with them, and what each number stands for."""
    paths = sorted({path for _, tensors in looked for path in tensors}, key=lambda path: spelled(path)[::-1])
    number = {path: (i,) for i, path in enumerate(paths)}
    renamed: list[Looked] = [(probe, {number[path]: tensor for path, tensor in tensors.items()}) for probe, tensors in looked]
    return renamed, {new: spelled(old) for old, new in number.items()}


def found(verdict: Verdict, called: Mapping[Any, str] | None = None) -> str:
    """The first source of a verdict in words, "-" for none."""
    for source in verdict.sources:
        names = " + ".join(spelled(path) if called is None else called[path] for path in source.paths)
        return names if source.form == "full" else f"{names} ({source.form})"
    return "-"


def compare(moment: Moment, looked: list[Looked]) -> tuple[str, str, str, str]:
    """What is found as in a recording, how, what blindly, and which names mislead."""
    verdict = Verdict(moment, looked)
    renamed, called = blindly(looked)
    how = next(iter(verdict.sources.values()), "")
    return found(verdict), how, found(Verdict(moment, renamed), called), ", ".join(map(spelled, verdict.rejected))


def print_table(title: str, results: list[tuple[str, tuple[str, str, str, str]]]) -> None:
    print(f"\n{title:24}{'found':46}{'blindly':46}misled by")
    for name, (first, how, blind, misled) in results:
        mark = {"numbers": " by numbers"}.get(how, "")
        if (first, blind, misled) != ("-", "-", ""):
            print(f"{name:24}{first + mark:46}{blind if blind == first else f'≠ {blind}':46}{misled}".rstrip())
    by_names = [(first, blind) for _, (first, how, blind, _) in results if how.startswith("names")]
    print(
        f"{title}, {len(results)} optimizers: {len(by_names)} by names, of which blindly the same in {sum(f == b for f, b in by_names)}, another in "
        f"{sum(f != b != '-' for f, b in by_names)}, none in {sum(b == '-' for _, b in by_names)}; {sum(how == 'numbers' for _, (_, how, _, _) in results)} "
        f"by numbers alone; names misled in {sum(bool(misled) for *_, (*_, misled) in results)}"
    )


def main() -> None:
    print(machine())
    print(", ".join(f"{package} {version(package)}" for package in ("pytorch-optimizer", "heavyball")))
    text, _ = language_reference()
    looked: dict[str, list[Looked]] = {}
    failed: list[str] = []
    for name, cls in optimizers():
        try:
            looked[name] = looked_at(cls, text)
        except Exception as error:
            failed.append(f"{name} ({type(error).__name__})")
    for moment in (FIRST_MOMENT, SECOND_MOMENT):
        with torch.no_grad():
            print_table(moment.title, [(name, compare(moment, seen)) for name, seen in looked.items()])
    print(f"\nnot with plain defaults: {', '.join(failed)}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
