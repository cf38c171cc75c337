"""Muon-like optimizers, written for the tests by drawing every part of one at random: how momenta, iteration, scale, decay and state are done."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Triple = tuple[float, float, float]

JORDAN = [(3.4445, -4.7750, 2.0315)]
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462), (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393), (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]  # fmt: skip
CANS = [
    (8.4703, -25.1081, 18.6293), (4.1828, -3.1087, 0.5806), (3.9619, -2.9541, 0.5630), (3.2866, -2.4647, 0.5074), (2.2737, -1.6447, 0.4162),
]  # fmt: skip
CUBIC = [(1.5, -0.5, 0.0)]

SHAPES = ((16, 24), (24, 16), (16, 16), (48, 16), (24, 40), (32, 24))
BLOCKED = ((48, 16), (16, 16), (32, 24))  # whose rows three or two heads share
STACK, KERNEL = (3, 16, 24), (12, 4, 2, 2)  # iterated slice by slice, and flattened


@dataclass(frozen=True)
class Form:
    """One optimizer.

    Attributes:
        momentum: M ← lerp(M, g), μM + g, or none.
        nesterov: what is orthogonalised: M, lerp(g, M), the same written into the gradient, or g + μM.
        transform: what is done to it first: nothing, its sign, clipping, or its rows brought to one norm.
        triples: of every step.
        as_tensors: whether coefficients are tensors.
        dtype: of the iteration.
        cast_first: whether the transform is in that format.
        tall: matrices with more rows than columns are transposed, or XᵀX is used.
        arithmetic: how a step is written.
        norm: what X₀ is divided by: a multiple of ‖M‖_F, or a closer bound of ‖M‖₂: √(‖M‖₁‖M‖_∞), √‖MMᵀ‖_F.
        margin: that multiple.
        output: what follows the iteration.
        scale: which function of the shape O is multiplied by.
        decay: of the weights.
        layout: parameter by parameter, stacked by shape with a state of each, or with one state of all.
        heads: blocks of rows, each iterated on its own; 1 for none.
        compiled: backend of torch.compile, or none.
        shapes: of the matrices.
    """

    seed: int
    momentum: str
    nesterov: str
    transform: str
    triples: tuple[Triple, ...]
    as_tensors: bool
    dtype: torch.dtype
    cast_first: bool
    tall: str
    arithmetic: str
    norm: str
    margin: float
    output: str
    scale: str
    decay: str
    layout: str
    heads: int
    compiled: str | None
    shapes: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        """In one line, what is usual left out."""
        usual = {
            "nesterov": "none",
            "transform": "none",
            "as_tensors": False,
            "cast_first": False,
            "heads": 1,
            "compiled": None,
            "layout": "each",
        }
        left_out = {"triples", "shapes", "seed"} | {key for key, value in usual.items() if getattr(self, key) == value}
        told = [f"{key}={getattr(self, key)}" for key in self.__dataclass_fields__ if key not in left_out]
        return f"#{self.seed} {len(self.triples)} steps of {self.triples[0][0]:.3f}, {', '.join(told)}; {self.shapes}"


def drawn(seed: int) -> Form:
    """The optimizer of a seed."""
    pick = random.Random(seed)
    momentum = pick.choice(["ema", "ema", "sum", "sum", "none"])
    layout = pick.choice(["each", "each", "stacked", "one state"])
    heads = pick.choice([2, 3]) if layout == "each" and pick.random() < 0.15 else 1
    if heads > 1:
        shapes = [shape for shape in BLOCKED if heads == 2 or shape[0] % 3 == 0][: pick.choice([1, 2])]
    else:
        shapes = [pick.choice(SHAPES) for _ in range(2)]
        shapes += [shapes[0]] if layout != "each" else []  # two that are stacked
        if layout == "each" and pick.random() < 0.2:
            shapes += [pick.choice([STACK, KERNEL])]
    dtype = pick.choice([torch.bfloat16] * 5 + [torch.float32] * 4 + [torch.float64])
    triples = tuple(_triples(pick, dtype))
    return Form(
        seed=seed,
        momentum=momentum,
        nesterov="none" if momentum == "none" else pick.choice(["none", "lerp", "in the gradient", "add"]),
        transform=pick.choice(["none"] * 4 + ["sign", "clip", "rows", "rows"]),
        triples=triples,
        as_tensors=pick.random() < 0.2,
        dtype=dtype,
        cast_first=pick.random() < 0.3,
        tall=pick.choice(["transposed", "columns"]),
        arithmetic=pick.choice(["added", "plain", "jordan", "in place", "powers"]),
        norm=pick.choice(["frobenius"] * 8 + ["one and infinity", "gram"]),
        margin=pick.choice([1.0, 1.0, 1.01, 1.02, 1.1]),
        output=pick.choice(["scale"] * 4 + ["snap", "rows", "columns", "elements"]),
        scale=pick.choice(["one", "sqrt of rows by columns", "at least one", "0.2 sqrt of the largest"]),
        decay=pick.choice(["none", "decoupled", "cautious"]),
        layout=layout,
        heads=heads,
        compiled="eager" if pick.random() < 0.12 else None,
        shapes=tuple(shapes),
    )


def _triples(pick: random.Random, dtype: torch.dtype) -> list[Triple]:
    steps = pick.choice([1, 2, 3, 4, 5, 5, 5, 6, 7])
    of = pick.choice(["jordan", "jordan", "polar express", "polar express", "cans", "cubic", "random", "random, one"])
    if of.startswith("random"):
        found = [_convergent(pick) for _ in range(steps)]
        return [found[0]] * steps if of.endswith("one") else found
    of = "polar express" if of == "cans" and dtype == torch.bfloat16 else of  # which leaves no room for rounding, and diverges
    known = {"jordan": JORDAN, "polar express": POLAR_EXPRESS, "cans": CANS, "cubic": CUBIC}[of]
    return (known + [known[-1]] * steps)[:steps]


def applied(form: Form) -> list[Triple]:
    """The triples as the arithmetic has them: a tensor of one number is rounded to the format of the iteration."""
    if not form.as_tensors:
        return list(form.triples)
    return [tuple(float(torch.tensor(value).to(form.dtype)) for value in triple) for triple in form.triples]  # type: ignore[misc]


def _convergent(pick: random.Random) -> Triple:
    """p(1) = 1 and |p′(1)| ≤ 0.4: values stay about 1 or come there."""
    a, slope = pick.uniform(1.7, 2.7), pick.uniform(-0.4, 0.4)
    b = (5 - 4 * a - slope) / 2
    return a, b, 1 - a - b


# One update, of one matrix or a stack of them.


def iterate(form: Form, given: Tensor) -> Tensor:
    """Newton–Schulz of a matrix or a stack, in its own orientation."""
    x = given.to(form.dtype)
    rows, cols = x.shape[-2:]
    turned = rows > cols and form.tall == "transposed"
    x = x.mT if turned else x
    if form.norm == "frobenius":
        x = x / (x.norm(dim=(-2, -1), keepdim=True) * form.margin + 1e-7)
    elif form.norm == "gram":
        x = x / ((x @ x.mT).norm(dim=(-2, -1), keepdim=True).sqrt() + 1e-7)
    else:
        bound = x.abs().sum(-1).amax(-1) * x.abs().sum(-2).amax(-1)
        x = x / (bound.sqrt()[..., None, None] + 1e-7)
    of_columns = x.shape[-2] > x.shape[-1]
    for triple in form.triples:
        a, b, c = (torch.tensor(value) for value in triple) if form.as_tensors else triple
        gram = x.mT @ x if of_columns else x @ x.mT
        x = _step(form, x, gram, a, b, c, of_columns)
    return x.mT if turned else x


def _step(form: Form, x: Tensor, gram: Tensor, a: Any, b: Any, c: Any, of_columns: bool) -> Tensor:
    def times(matrix: Tensor, y: Tensor) -> Tensor:
        return y @ matrix if of_columns else matrix @ y

    # baddbmm of bfloat16 on a CPU, torch 2.13, takes beta for 1 where alpha is 0.
    if form.arithmetic == "added" and not form.as_tensors and c != 0:
        added = torch.baddbmm if x.ndim == 3 else torch.addmm
        polynomial = added(gram, gram, gram, beta=b, alpha=c)
        return added(x, x, polynomial, beta=a) if of_columns else added(x, polynomial, x, beta=a)
    if form.arithmetic == "powers":
        cubed = times(gram, x)
        return a * x + b * cubed if not form.as_tensors and c == 0 else a * x + b * cubed + c * times(gram, cubed)
    polynomial = b * gram + c * gram @ gram if form.arithmetic == "jordan" else b * gram + c * (gram @ gram)
    if form.arithmetic == "in place":
        return times(polynomial, x).add_(x * a)
    return a * x + times(polynomial, x)


def update(form: Form, g: Tensor, m: Tensor | None, second: Tensor | None, w: Tensor, lr: float) -> Tensor:
    """Change weights, momenta and perhaps the gradient, and return what was orthogonalised; all of one shape, (m, n) or (K, m, n)."""
    mu = 0.9
    given = g
    if m is not None:
        m.lerp_(g, 1 - mu) if form.momentum == "ema" else m.mul_(mu).add_(g)
        given = {
            "none": lambda: m, "lerp": lambda: g.lerp(m, mu), "in the gradient": lambda: g.lerp_(m, mu), "add": lambda: g + mu * m,
        }[form.nesterov]()  # fmt: skip
    given = given.to(form.dtype) if form.cast_first else given
    if form.transform == "sign":
        given = given.sign()
    elif form.transform == "clip":
        bound = 1.2 * given.abs().mean((-2, -1), keepdim=True)
        given = given.minimum(bound).maximum(-bound)
    elif form.transform == "rows":
        given = given * (given.norm(dim=(-2, -1), keepdim=True) / sqrt(given.shape[-2]) / given.norm(dim=-1, keepdim=True))
    count = form.heads
    o = iterate(form, given.reshape(count, -1, given.shape[-1])).reshape(given.shape) if count > 1 else iterate(form, given)
    followed(form, o.to(w.dtype), second, w, lr)
    return given.clone()


def followed(form: Form, o: Tensor, second: Tensor | None, w: Tensor, lr: float) -> None:
    """What becomes of O on its way to the weights."""
    rows, cols = o.shape[-2:]
    if form.output == "snap":
        o = o * (sqrt(min(rows, cols)) / o.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-6))
    elif second is not None and form.output == "elements":
        second.mul_(0.9).addcmul_(o, o, value=0.1)
        o = o / (second.sqrt() + 1e-8)
        o = o * (sqrt(min(rows, cols)) / o.norm(dim=(-2, -1), keepdim=True))
    elif second is not None:
        size = o.norm(dim=(-2, -1), keepdim=True)
        second.lerp_(o.square().mean(-1 if form.output == "rows" else -2, keepdim=True), 0.1)
        o = o * second.clamp_min(1e-10).rsqrt()
        o = o * (size / o.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))
    scale = {
        "one": 1.0, "sqrt of rows by columns": sqrt(rows / cols), "at least one": max(1.0, rows / cols) ** 0.5,
        "0.2 sqrt of the largest": 0.2 * sqrt(max(rows, cols)),
    }[form.scale]  # fmt: skip
    if form.decay == "decoupled":
        w.mul_(1 - lr * DECAY)
    if form.decay == "cautious":
        w.sub_(lr * scale * o + lr * DECAY * w * ((o * w) >= 0))
    else:
        w.sub_(o, alpha=lr * scale)


DECAY = 0.5


@lru_cache(1)
def compiled(form: Form) -> Callable[..., Tensor]:
    """:func:`update` as torch.compile makes it; of the last form alone, as what dynamo keeps is dropped with it."""
    torch._dynamo.reset()
    return torch.compile(update, fullgraph=True, dynamic=False, backend=form.compiled or "eager")


class Generated(Optimizer):
    """The optimizer of a form. Vectors descend along the sign of their gradient.

    `given` holds what each parameter's iteration was given in the last step; whoever looks empties it before the next.
    """

    def __init__(self, params: Iterable[Tensor], form: Form) -> None:
        self.form = form
        self.given: dict[int, Tensor] = {}
        params = list(params)
        shapes = dict.fromkeys(p.shape for p in params) if form.layout == "one state" else [None]
        groups = [{"params": [p for p in params if shape in (None, p.shape)]} for shape in shapes]
        super().__init__(groups, {"lr": 0.02, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        run = update if self.form.compiled is None else compiled(self.form)
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.ndim > 1]
            for p in group["params"]:
                if p.ndim == 1:
                    p.sub_(p.grad.sign(), alpha=group["lr"])
            if self.form.layout == "each":
                for p in matrices:
                    self.one(run, p, group["lr"])
            else:
                for shape in dict.fromkeys(p.shape for p in matrices):
                    self.stack(run, [p for p in matrices if p.shape == shape], group["lr"])

    def second(self, state: dict[str, Any], like: Tensor) -> Tensor | None:
        """The second moment of what O becomes, where there is one."""
        if self.form.output not in ("rows", "columns", "elements"):
            return None
        shape = {"rows": (*like.shape[:-1], 1), "columns": (*like.shape[:-2], 1, like.shape[-1]), "elements": like.shape}[self.form.output]
        return state.setdefault("second_momentum_buffer", torch.zeros(shape))

    def first(self, state: dict[str, Any], like: Tensor) -> Tensor | None:
        """The momentum, where there is one."""
        return None if self.form.momentum == "none" else state.setdefault("momentum_buffer", torch.zeros_like(like))

    def one(self, run: Callable[..., Tensor], p: Tensor, lr: float) -> None:
        assert p.grad is not None
        flat = (len(p), -1) if p.ndim == 4 else p.shape
        g, w = p.grad.reshape(flat), p.detach().reshape(flat)
        state = self.state[p]
        self.given[id(p)] = run(self.form, g, self.first(state, w), self.second(state, w), w, lr)

    def stack(self, run: Callable[..., Tensor], ps: list[Tensor], lr: float) -> None:
        g, w = torch.stack([p.grad for p in ps if p.grad is not None]), torch.stack([p.detach() for p in ps])
        states = [self.state[ps[0]]] if self.form.layout == "one state" else [self.state[p] for p in ps]
        if self.form.layout == "one state":
            m, second = self.first(states[0], w), self.second(states[0], w)
        else:
            kept = [
                [one for one in (self.first(s, p.detach()), self.second(s, p.detach())) if one is not None]
                for s, p in zip(states, ps, strict=True)
            ]
            m = torch.stack([tensors[0] for tensors in kept]) if self.form.momentum != "none" else None
            second = torch.stack([tensors[-1] for tensors in kept]) if self.form.output in ("rows", "columns", "elements") else None
        given = run(self.form, g, m, second, w, lr)
        if self.form.layout == "stacked":
            for i, tensors in enumerate(kept):
                for tensor, stacked in zip(tensors, [one for one in (m, second) if one is not None], strict=True):
                    tensor.copy_(stacked[i])
        torch._foreach_copy_(ps, list(w.unbind(0)))
        for p, one in zip(ps, given, strict=True):
            self.given[id(p)] = one


def parameters(form: Form) -> list[torch.nn.Parameter]:
    """Weights of the form's shapes and a vector."""
    generator = torch.Generator().manual_seed(form.seed)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in form.shapes]
    return [*made, torch.nn.Parameter(torch.zeros(8))]


def give_gradients(params: Iterable[Tensor], seed: int) -> None:
    """A gradient that stays, of singular values from 1 to 1/20, and a twentieth of noise."""
    for i, p in enumerate(params):
        p.grad = _signal(tuple(p.shape), i) + 0.05 / sqrt(p.numel()) * torch.randn(
            p.shape, generator=torch.Generator().manual_seed(100 * seed + i)
        )


@lru_cache(256)
def _signal(shape: tuple[int, ...], number: int) -> Tensor:
    if len(shape) < 2:
        return torch.ones(shape)
    rows, cols = (shape[0], prod(shape[1:])) if len(shape) != 3 else shape[-2:]
    g = torch.randn(shape if len(shape) == 3 else (rows, cols), generator=torch.Generator().manual_seed(number))
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    return (u * torch.logspace(0, -1.3, s.shape[-1]) @ vt).reshape(shape)
