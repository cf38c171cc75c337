"""Two hundred Muon-like optimizers drawn at random, each trained for five steps: what is found of them against what they noted themselves.

Seen on these seeds: all found right. What is found wrong without the run telling of it would mislead; what is not found would not.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from optiscope.hooks.watching.iterations import fit, powers
from watching.generator import Generated, drawn, give_gradients, parameters
from watching.judging import STEPS, Verdict, judged

COUNT = 200


@pytest.fixture(autouse=True)
def _nothing_stays_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def test_generator_draws_every_kind() -> None:
    """Every choice for every part occurs, and no training breaks down: a step that is not finite shows nothing."""
    forms = [drawn(seed) for seed in range(COUNT)]
    chosen = {
        name: Counter(getattr(form, name) for form in forms)
        for name in (
            "momentum",
            "nesterov",
            "transform",
            "as_tensors",
            "dtype",
            "tall",
            "arithmetic",
            "norm",
            "margin",
            "output",
            "decay",
            "layout",
        )
    }
    assert [len(counts) for counts in chosen.values()] == [3, 4, 4, 2, 3, 2, 5, 3, 4, 5, 3, 3]
    assert min(count for counts in chosen.values() for count in counts.values()) >= 8
    assert {len(form.triples) for form in forms} == set(range(1, 8))
    assert sum(form.heads > 1 for form in forms) >= 8
    assert sum(form.compiled is not None for form in forms) >= 8
    for form in forms[::5]:
        ps = parameters(form)
        optimizer = Generated(ps, form)
        for step in range(STEPS):
            give_gradients(ps, step)
            optimizer.step()
        assert all(bool(p.isfinite().all()) for p in ps), form


def test_generated_muons_are_found_as_they_are() -> None:
    verdicts: list[Verdict] = []
    for seed in range(COUNT):
        with TemporaryDirectory() as folder:
            verdicts.append(judged(drawn(seed), Path(folder) / "run.zarr"))
    table = "\n".join(
        f"{verdict.form}\n" + "\n".join(f"    {kind}{' (told by nothing)' if kind in verdict.silent else ''}: {what}" for kind, what in verdict.wrong.items())
        for verdict in verdicts
        if verdict.wrong
    )  # fmt: skip
    print(table)
    assert [verdict.form for verdict in verdicts if not verdict.neutral] == []
    assert [verdict.form for verdict in verdicts if verdict.silent] == [], table
    assert sum(not verdict.wrong for verdict in verdicts) >= 0.98 * COUNT, table


@pytest.mark.parametrize("triple", [(3.4445, -4.775, 2.0315), (1.5, -0.5, 0.0), (1.875, -1.25, 0.375)])
def test_coefficients_of_orthogonal_matrices_are_told_by_what_was_handed_in(triple: tuple[float, float, float]) -> None:
    """Least squares of aX + bX + cX tell a + b + c alone: first that they do, then that the handed numbers decide."""
    x = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    x1, x3, x5 = powers(x)
    y = (triple[0] * x1 + triple[1] * x3 + triple[2] * x5).bfloat16()
    columns = torch.stack([x1, x3, x5], -1)
    alone, _ = fit(columns, y)
    assert max(abs(found - own) for found, own in zip(alone, triple, strict=True)) > 0.1
    assert sum(alone) == pytest.approx(sum(triple), rel=0.01)
    told, left = fit(columns, y, {value for value in triple if value}, torch.bfloat16, before=triple)
    assert told == triple
    assert left < 0.01
