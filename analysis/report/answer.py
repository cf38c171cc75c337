"""What one study says about one run: asked once, shown in a folder or on a page."""

from collections import defaultdict
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import xarray as xr
from matplotlib.figure import Figure

from .drawable import drawable, fewer


@dataclass(frozen=True)
class Answer:
    """A study's dataset with the texts around it."""

    study: ModuleType
    dataset: xr.Dataset

    @property
    def question(self) -> str:
        """What the study asks."""
        return str(self.study.QUESTION)

    @property
    def reading(self) -> str:
        """How to read its picture."""
        return str(self.study.READING)

    @property
    def summary(self) -> str:
        """The result in a sentence."""
        return str(self.study.summary(self.dataset))

    def plot(self) -> Figure:
        """The study's picture, under labels that can be drawn and no more of them than fit."""
        chosen, note = fewer(self.dataset)
        figure: Figure = self.study.plot(drawable(chosen))
        if note:
            figure.suptitle(note, fontsize=8, color="0.4")
        return figure

    def tables(self) -> dict[str, xr.Dataset]:
        """The dataset by sets of dimensions, under their names joined: variables of different dimensions share no rows of a table. Empty ones are left out."""
        by_dimensions: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for variable in self.dataset.data_vars:
            by_dimensions[tuple(map(str, self.dataset[variable].dims))].append(str(variable))
        return {"-".join(dims): self.dataset[names] for dims, names in by_dimensions.items() if dims and self.dataset[names[0]].size}


def ask(run: xr.DataTree, name: str) -> Answer:
    """The answer of the study `name`.

    Raises:
        ValueError: the run does not allow it (no orthogonalised matrix, say), with the reason.
    """
    study = import_module(f"..studies.{name}", __package__)
    return Answer(study, study.study(run))
