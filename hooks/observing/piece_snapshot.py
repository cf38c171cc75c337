"""Reading one parameter that lies in pieces on several ranks: what is here of it around a step, and the whole of it, once its pieces are together.

What an optimizer's row reads is seldom a piece's own (a norm, a mean of rows, a mixed momentum), so nothing is computed of pieces. They are copied
around the step, put together by one rank, and read there by the same row as a parameter that was never cut.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor

from ..adapters import Adapter, Reading, State, state_of
from ..adapters.names import tensors_in
from .copies import Copies
from .matrix import Matrix
from .placement import Piece, beside, is_cut, piece_of
from .snapshot import Snapshot

Key: TypeAlias = tuple[Any, ...]  # "weight", "after" or "gradient"; or "before" or "state" with the path of a tensor in the state

_WEIGHT, _AFTER, _GRADIENT = ("weight",), ("after",), ("gradient",)


class PieceSnapshot:
    """What is here of one parameter around one step.

    Attributes:
        matrices: the parameter's.
        adapter, reading: as of :class:`Snapshot`; what the reading holds is of pieces.
        pieces: copies of what is here, by key.
        forms: paths of state that has another form than the parameter or a piece of it, and cannot be put together.
        errors: what failed.
    """

    def __init__(
        self, matrices: list[Matrix], adapter: Adapter, reading: Reading, keeps_gradient: bool, has_spectra: bool, copies: Copies
    ) -> None:
        """Before the step."""
        self.matrices, self.adapter, self.reading, self.copies = matrices, adapter, reading, copies
        self.pieces: dict[Key, Piece] = {}
        self.forms: set[Key] = set()
        self.errors: list[Exception] = []
        self._keeps_gradient, self._has_spectra = keeps_gradient, has_spectra
        self._others: dict[str, State] = {}  # what the state holds beside pieces, before the step and after it
        self._own = self._copied(piece_of(reading.parameter.detach()))
        if adapter.before is not None:
            self._copy_state("before")

    def see_gradient(self, grad_scale: Tensor | None = None) -> None:
        """Copy what is here of the gradient before the optimizer touches it; `grad_scale` as of :meth:`Snapshot.see_gradient`."""
        gradient = self.reading.parameter.grad
        if gradient is None:
            return
        piece = beside(gradient.detach(), self._own)
        if piece is None:
            raise ValueError(f"the gradient of {self.matrices[0].name} is no piece like the parameter's: {tuple(gradient.shape)}")
        if grad_scale is not None:
            piece = piece.of(piece.tensor / grad_scale)
        former = self.pieces.get(_GRADIENT)  # of a closure that was called before
        self.pieces[_GRADIENT] = self._copied(piece, None if former is None else former.tensor)

    def read(self) -> bool:
        """Copy what the step has left; whether there is something to put together: without a gradient nothing was done."""
        if _GRADIENT not in self.pieces:
            return False
        self.pieces[_WEIGHT] = self._own
        self.pieces[_AFTER] = self._copied(piece_of(self.reading.parameter.detach()))
        self._copy_state("state")
        return True

    def _copy_state(self, when: str) -> None:
        state = state_of(self.reading.optimizer, self.reading.parameter)
        others: dict[Key, Tensor | None] = {}
        for path, tensor in tensors_in(state).items():
            piece = beside(tensor.detach(), self._own)
            if tensor.numel() == 1 and not is_cut(tensor):
                others[path] = tensor.detach().clone()  # a count of steps, which every rank has
            elif piece is None:
                self.forms.add(path)
                others[path] = None
            else:
                self.pieces[(when, *path)] = self._copied(piece)
                others[path] = None
        self._others[when] = with_tensors(state, others)

    def _copied(self, piece: Piece, instead_of: Tensor | None = None) -> Piece:
        return piece.of(self.copies.of(piece.tensor, instead_of))

    def whole(self, tensors: Mapping[Key, Tensor]) -> Snapshot:
        """The parameter as one process would have read it around the step, from what its pieces make together.

        Raises:
            ValueError: weights or gradient are not among `tensors`.
        """
        if missing := [key[0] for key in (_WEIGHT, _AFTER, _GRADIENT) if key not in tensors]:
            raise ValueError(f"what the ranks hold of {self.matrices[0].name} is not the whole of its {' and '.join(missing)}")
        weight, before = tensors[_WEIGHT], self._state("before", tensors)
        reading = replace(self.reading, parameter=weight, weight=weight, state=before, gradient=None, before=None)
        found = Snapshot(self.matrices, self.adapter, reading, self._keeps_gradient, self._has_spectra)
        found.take_gradient(tensors[_GRADIENT], is_own=True)
        reading.parameter, reading.state = tensors[_AFTER], self._state("state", tensors)
        return found

    def _state(self, when: str, tensors: Mapping[Key, Tensor]) -> State:
        found: State = with_tensors(self._others.get(when, {}), {key[1:]: tensor for key, tensor in tensors.items() if key[0] == when})
        return found


def with_tensors(state: Any, tensors: Mapping[Key, Tensor | None], at: Key = ()) -> Any:
    """The same containers with others in the place of what is at some paths."""
    if at in tensors:
        return tensors[at]
    if isinstance(state, Mapping):
        return {key: with_tensors(value, tensors, (*at, key)) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(with_tensors(value, tensors, (*at, i)) for i, value in enumerate(state))
    return state
