"""Published Muons that no row of the table knows: what a run says of them against what they noted themselves, bit by bit; and the authors' SophiaG."""

from pathlib import Path

import pytest
import torch
from contract.document import parts
from contract.harness import Model, hidden
from torch import nn

from optiscope.analysis import open_run
from optiscope.hooks import attach
from watching import standins
from watching.cases import STAND_INS
from watching.document import written_out
from watching.measuring import STEPS, measured


@pytest.mark.parametrize("name", STAND_INS)
def test_stand_in_is_read_as_it_is(name: str) -> None:
    standin, result = STAND_INS[name], measured(name)
    assert not result.in_table
    assert result.inputs_right == [True] * STEPS
    assert sum(kind["count"] for kind in result.iterations) == len(hidden(Model()))
    for one in result.watched:
        assert one["unexplained"] < 0.05
        assert one["difference"] < 0.05
    for kind in result.iterations:
        assert kind["dtype"] == "bfloat16"
        assert kind["then"] in standin.then
        assert kind["decay"] in standin.decays
    assert result.coefficients_error(standin.triples) <= 1e-2
    assert standin.says in result.entry["spectrum_of"][0]
    # Of the right length for the matrices of the layers, none for others.
    assert result.schedules == {matrix: len(standin.triples) if "_proj" in matrix else 0 for matrix in result.schedules}
    if standin.scale is not None:
        assert result.scales == pytest.approx({shape: standin.scale(*shape) for shape in result.scales}, rel=1e-2)
    assert result.neutral


def test_the_coverage_document_says_what_was_just_measured_of_watched_classes() -> None:
    assert parts()[1] == written_out({name: measured(name) for name in STAND_INS})


def test_sophia_of_its_authors_tells_its_win_rate(tmp_path: Path) -> None:
    """|m|/(ρBh + 1e-15) < 1, B being an argument of the step that is kept nowhere."""
    torch.manual_seed(0)
    model = Model()
    optimizer = standins.SophiaG(model.parameters(), rho=0.1)
    with attach(optimizer, model, tmp_path / "run.zarr", every=1, on_error="raise"):
        for step in range(STEPS):
            batch = torch.randint(24, (8, 13), generator=torch.Generator().manual_seed(step))
            nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
            if step % 2 == 0:
                optimizer.update_hessian()
            optimizer.step(bs=400)
            optimizer.zero_grad()
    run = open_run(tmp_path / "run.zarr")
    moments = run["second_moment"]
    parameters = dict(model.named_parameters())
    for i, name in enumerate(map(str, moments["name"].values)):
        state = optimizer.state[parameters[name]]
        wins = float((state["exp_avg"].abs() / (0.1 * 400 * state["hessian"] + 1e-15) < 1).double().mean())
        assert float(moments["sophia_win_rate"].values[-1, i]) == pytest.approx(wins, abs=0.01)
        assert 0 < wins < 1
    assert run.attrs["optimizers"][0]["read_by"] == ["table"]
