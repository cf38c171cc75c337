"""Reading a class that is not in the table by what its state calls its tensors.

Most libraries say `exp_avg` and `exp_avg_sq`, or a few words like them, for the first and the second moment; some put them
one or two containers deep (`state[p]["block_0"]["filtered_grad"]`), or add a prefix and a number (`update_by_adam_exp_avg_0`).
A name alone can mislead; `identification` holds what is found here against the gradients.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .adapter import Reader, Reading, SecondMoment, State

Path: TypeAlias = tuple[Any, ...]  # keys and indices from a parameter's state down to a tensor

_DEPTH = 3  # containers within each other that are looked into

_MOMENTUM = re.compile(
    r"exp_avg|m|m_t|mu|mom|momentum|moment|moments|moment_?1|(momentum|mom|moment_?1)_buf(fer)?|first_moment(um)?"
    r"|velocity|filtered_grad|(grad|gradient|exp_avg|(mov(ing)?_)?avg)_(grad|avg|ema)|ema_grad"
)
# Where something stands before the name, only names that mean nothing else.
_MOMENTUM_ENDING = re.compile(r"(?!second).*_(exp_avg|momentum|momentum_buffer|filtered_grad)")

_SECOND = re.compile(
    r"exp_avg_sq|exp_avg_var|exp_avg_squared|exp_inf|square_avg|sq_avg|grad_sq_avg|sum|sum_sq|grad_sum_sq"
    r"|v|v_t|nu|v_?mean|moment_?2|moment_?2_buf(fer)?|second_moment"
)
_SECOND_ENDING = re.compile(r".*_(exp_avg_sq|square_avg)")
_MAXIMUM = re.compile(r"(.*_)?max_(exp_avg_sq|v)")  # AMSGrad's: what the update divides by
_HESSIAN = re.compile(r"(exp_)?hessian(_diag)?(_sq)?(_moment|_ema)?|(.*_)?approx_hessian|ema_hessian")
_ROWS = re.compile(r"(.*_)?(exp_avg_sq|square_avg|v|nu|moment2|second_moment)_row|row_(var|v)")
_ENCODING = re.compile(r"(.*[_:])?scales?\d*|.*(absmax|qmap|quantized|zero_point).*")  # how an 8-bit moment is to be decoded

# Formats whose numbers can be read as they are.
_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True)
class Source:
    """Where a moment is and what form it has; two paths, rows and columns, where it is kept factored."""

    paths: tuple[Path, ...]
    form: str


def tensors_in(state: State) -> dict[Path, Tensor]:
    """Every tensor of one parameter's state, those in nested containers included, by its path."""
    return dict(_walk(state, ()))


def _walk(node: Any, path: Path) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(node, Tensor):
        yield path, node
    elif isinstance(node, (Mapping, list, tuple)) and len(path) < _DEPTH:
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _walk(value, (*path, key))


def spelled(path: Path) -> str:
    """A path as text: block_0.filtered_grad."""
    return ".".join(map(str, path))


def key_of(path: Path) -> str:
    """The name of a tensor: the last word on its path, in lower case, without a number or a format after it."""
    word = next((key for key in reversed(path) if isinstance(key, str)), "")
    return re.sub(r"_\d+$", "", word.lower().split("::")[0])


def is_encoding(path: Path) -> bool:
    """Whether a tensor's name says that it is a part of an encoded one (`exp_avg_sq::scales`): it may follow what it encodes."""
    return _ENCODING.fullmatch(spelled(path[-1:]).lower()) is not None


def in_shape(tensor: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """The tensor in a parameter's shape, axes of length 1 and flattening aside; None where it has another or another format."""
    if tensor is None or not is_plain(tensor):
        return None
    own, wanted = ([size for size in sizes if size != 1] for sizes in (tensor.shape, shape))
    fits = own == wanted or (tensor.ndim == 1 and tensor.numel() == torch.Size(shape).numel())
    return tensor.detach().reshape(tuple(shape)) if fits else None


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are what they seem: floating-point, dense, not a subclass that encodes them."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in _DTYPES and tensor.layout == torch.strided


def named_momenta(tensors: Mapping[Path, Tensor]) -> list[Path]:
    """Paths whose names are a first moment's, in whatever shape and format, whole names first."""
    keys = {path: key_of(path) for path, tensor in tensors.items() if tensor.numel() > 1}
    whole = [path for path, key in keys.items() if _MOMENTUM.fullmatch(key)]
    return whole + [path for path, key in keys.items() if path not in whole and _MOMENTUM_ENDING.fullmatch(key)]


def named_second_moments(tensors: Mapping[Path, Tensor], shape: Sequence[int]) -> list[Source]:
    """What is named like a second moment and has a form that can be read, best first."""
    sources: list[Source] = []
    for pattern in (_MAXIMUM, _SECOND, _SECOND_ENDING):
        named = (path for path in tensors if pattern.fullmatch(key_of(path)) and not is_encoding(path))
        sources += [Source((path,), forms[0]) for path in named if (forms := forms_of(tensors[path], shape))]
    sources += [
        Source((path,), "hessian")
        for path, tensor in tensors.items()
        if _HESSIAN.fullmatch(key_of(path)) and in_shape(tensor, shape) is not None
    ]
    for path in tensors:
        columns = (*path[:-1], str(path[-1]).replace("row", "col"))
        if _ROWS.fullmatch(key_of(path)) and columns in tensors:
            sources.append(Source((path, columns), "row_col"))
    return sources


def forms_of(tensor: Tensor, shape: Sequence[int]) -> tuple[str, ...]:
    """The forms of a second moment that a tensor's shape allows, the likelier first; none for one that cannot be read."""
    if not is_plain(tensor):
        return ()
    if in_shape(tensor, shape) is not None:
        return ("full",)
    if tensor.numel() == 1:
        return ("scalar",)
    rows, cols = shape[0], torch.Size(shape[1:]).numel()
    own = tuple(tensor.shape)
    of_rows = ("row",) if own in ((rows,), (rows, 1)) else ()
    # One number per column, or per some of the rows.
    some_rows = tensor.shape[-1] == 1 and 1 < tensor.numel() < rows and rows % tensor.numel() == 0
    return of_rows + (("block",) if own in ((cols,), (1, cols)) or some_rows else ())


def read_second_moment(source: Source, tensors: Mapping[Path, Tensor], shape: Sequence[int]) -> SecondMoment | None:
    """The values of a source in one parameter's state; None where they are not there in the form it says.

    Factors are multiplied out as V_ij = r_i c_j / mean(r), for r and c the means of V over columns and rows
    (Shazeer & Stern 2018, arXiv 1804.04235, eq. 4, there with sums).
    """
    found = [tensors.get(path) for path in source.paths]
    if any(tensor is None or not is_plain(tensor) for tensor in found):
        return None
    values = [tensor.detach() for tensor in found if tensor is not None]
    if source.form == "row_col":
        rows, cols = values[0].flatten(), values[1].flatten()
        if (len(rows), len(cols)) != (shape[0], torch.Size(shape[1:]).numel()):
            return None
        return SecondMoment(torch.outer(rows, cols / rows.mean()).reshape(tuple(shape)), "row_col")
    full = in_shape(values[0], shape)
    if source.form in ("full", "hessian"):
        return None if full is None or (source.form == "full" and bool((full < 0).any())) else SecondMoment(full, source.form)
    return SecondMoment(values[0], source.form) if source.form in forms_of(values[0], shape) else None


def momentum_reader(chosen: Sequence[Path] = (), rejected: Collection[Path] = ()) -> Reader:
    """A reader of the first of `chosen` that a state has, else of what is named like a momentum and not `rejected`."""

    def read(reading: Reading) -> Tensor | None:
        tensors, shape = tensors_in(reading.state), reading.parameter.shape
        named = (path for path in named_momenta(tensors) if path not in rejected)
        return next((found for path in (*chosen, *named) if (found := in_shape(tensors.get(path), shape)) is not None), None)

    return read


def second_moment_reader(chosen: Sequence[Source] = (), rejected: Collection[Path] = ()) -> Callable[[Reading], SecondMoment | None]:
    """The same for second moments."""

    def read(reading: Reading) -> SecondMoment | None:
        tensors, shape = tensors_in(reading.state), reading.parameter.shape
        named = (source for source in named_second_moments(tensors, shape) if source.paths[0] not in rejected)
        sources = (*chosen, *named)
        return next((found for source in sources if (found := read_second_moment(source, tensors, shape)) is not None), None)

    return read
