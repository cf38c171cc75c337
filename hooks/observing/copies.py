"""Copies of what the training goes on to overwrite, for the thread that measures them, in memory that is used again."""

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Kind: TypeAlias = tuple[Any, ...]


class Memory:
    """The memory of copies that are not needed any more.

    It has its pages; fresh memory of a large size gets them one by one while it is filled, which takes as long as the copying itself. So as
    much is kept between records as the copies of one record need.
    """

    def __init__(self) -> None:
        self._free: dict[Kind, list[Tensor]] = {}  # appended to by one thread, popped from by another: that needs no lock

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy with the same strides."""
        free = self._free.get(_kind(tensor))
        return free.pop().copy_(tensor) if free else tensor.clone()

    def take_back(self, copies: list[Tensor]) -> None:
        """Use the memory of these again: nobody may look at them any more."""
        for copy in copies:
            self._free.setdefault(_kind(copy), []).append(copy)


class Copies:
    """Copies made around one step of one parameter."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._reusable: list[Tensor] = []
        self._own: set[int] = set()  # storages of copies
        self._of: dict[Kind, tuple[Tensor, Tensor]] = {}  # beside what they are copies of, so that nothing else comes to lie there

    def of(self, tensor: Tensor, instead_of: Tensor | None = None) -> Tensor:
        """A copy of the tensor as it is now, in the memory of an earlier one where there is one that nobody looks at any more."""
        tensor = tensor.detach()
        if instead_of is not None and _kind(instead_of) == _kind(tensor):
            return instead_of.copy_(tensor)
        # The memory of a device has an allocator that keeps it, and that of a wrapper is not where its strides say.
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and tensor.layout == torch.strided
        copy = self._memory.copy(tensor) if plain else tensor.clone()
        if plain and _kind(copy) == _kind(tensor):
            self._reusable.append(copy)
        return self.own(copy)

    def own(self, tensor: Tensor, unless: Iterable[Tensor] = ()) -> Tensor:
        """Know of a tensor that nobody else has, unless it shares the memory of one of some."""
        address = _address(tensor)
        if address and address not in map(_address, unless):  # a wrapper has none
            self._own.add(address)
        return tensor

    def after_step(self, tensor: Tensor) -> Tensor:
        """A copy of what is read after the step, one for all that read it; itself where it is a copy, or a part of one."""
        address = _address(tensor)
        if address in self._own:
            return tensor
        if not address:
            return self.of(tensor)
        place = (tensor.data_ptr(), *_kind(tensor))
        if place not in self._of:
            self._of[place] = tensor, self.of(tensor)
        return self._of[place][1]

    def give_back(self) -> None:
        """Let the memory be used again: nobody may look at the copies any more."""
        self._memory.take_back(self._reusable)
        self._reusable = []


def _kind(tensor: Tensor) -> Kind:
    return tensor.dtype, tensor.shape, tensor.stride()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
