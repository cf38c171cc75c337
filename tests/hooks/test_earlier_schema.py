"""A run of schema 1, as the first version wrote it: it opens, with the numbers it has, and a training goes on behind it."""

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn

from optiscope.diagnostics.catalogue import SCHEMA
from optiscope.diagnostics.store.files import Files
from optiscope.diagnostics.store.writer import Writer
from optiscope.hooks import attach

Read = Callable[[str | Path], Any]

FIXTURE = Path(__file__).parents[1] / "data" / "run_schema_1.tar.xz"
LAYERS = [f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("q_proj", "up_proj", "down_proj")]


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run_schema_1.zarr"


def assert_holds(run: Any, records: int = 8) -> None:
    """Numbers read with plain Zarr 3.1.6 from the archive's chunks; RMS targets follow from the shapes."""
    for group in ("geometry", "update", "second_moment"):
        assert run[group]["step"].values.tolist() == list(range(1, records + 1))
        assert run[group]["name"].values.tolist() == LAYERS + ["embed.weight"] * (group != "geometry")
    geometry, update = run["geometry"], run["update"]
    assert geometry["condition_number"].values[7] == pytest.approx(
        [322.2545812701482, 67.42820583292925, 176.70681352834748, 186.36460913667207, 78.127076440357, 206.1130288974274], rel=1e-14
    )
    assert np.isfinite(geometry["condition_number"].values).all()
    assert geometry["sigma_quantile"].values[3, 2, [0, 31, 63]].tolist() == [0.0025689322501420975, 0.0442543588578701, 0.8550427556037903]
    assert update["update_rms"].values[:4, 0] == pytest.approx(
        [
            0.00478029280190951,
            0.00508461392137188,
            0.00508874315404646,
            0.00518857938282172,
        ],
        rel=1e-14,
    )
    # torch.optim.Muon scales O, of RMS 1/√max(rows, cols), by √max(1, rows/cols).
    shapes = [(12, 12), (20, 12), (12, 20)] * 2
    targets = [max(1, m / n) ** 0.5 / max(m, n) ** 0.5 for m, n in shapes]
    assert update["update_rms_target"].values[0] == pytest.approx([*targets, np.nan], rel=1e-12, nan_ok=True)
    assert update["lr"].values[0].tolist() == [0.02] * 6 + [0.01]
    assert (update["rows"].values.tolist(), update["cols"].values.tolist()) == ([12, 20, 12] * 2 + [16], [12, 12, 20] * 2 + [12])
    assert np.isnan(update["trust_ratio"].values).all()
    assert run["second_moment"]["second_moment_form"].values[0].tolist() == [-1] * 6 + [0]
    assert run["scalars"]["loss"].values[:3].tolist() == [10.856040000915527, 8.825986862182617, 9.00515079498291]
    assert geometry.attrs["ns_schedules"][0]["coefficients"] == [[3.4445, -4.775, 2.0315]] * 5


def test_it_opens(earlier: Path, read: Read) -> None:
    assert read(earlier).attrs["optiscope_schema"] == 1
    assert_holds(read(earlier))


def test_a_training_goes_on_behind_it(earlier: Path, read: Read) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.up_proj, self.down_proj = (nn.Linear(n, m, bias=False) for m, n in ((12, 12), (20, 12), (12, 20)))

    model = nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()]), "embed": nn.Embedding(16, 12)})
    hidden = list(model["layers"].parameters())
    optimizers = [torch.optim.Muon(hidden, lr=0.02), torch.optim.AdamW(model["embed"].parameters(), lr=0.01)]
    before = read(earlier)
    with attach(optimizers, model, earlier, every=1, on_error="raise") as recorder:
        assert recorder.step == 8
        for p in model.parameters():
            p.grad = torch.linspace(-1, 2, p.numel()).view_as(p).sin()
        for optimizer in optimizers:
            optimizer.step()
    run = read(earlier)
    assert run.attrs["optiscope_schema"] == SCHEMA
    assert_holds(run, records=9)
    for group in before.children:
        for name, values in before[group].to_dataset().variables.items():
            shown = run[group][name].values
            np.testing.assert_array_equal(shown[: len(values)] if "step" in values.dims else shown, values.values)
            codecs = zarr.open_array(earlier / group / str(name), mode="r").metadata.codecs  # type: ignore[union-attr]
            assert codecs[-1].to_dict() == {"name": "crc32c"}
            assert {f.name.split(".")[0] for f in (earlier / group / str(name)).iterdir()} <= {"zarr", "c"}
            assert not (earlier / group / str(name) / "c").exists()  # the first version's keys
    assert np.isfinite(run["update"]["update_rms"].values).all()


class Killed(BaseException):
    """No handler for `Exception` runs."""


def test_killed_while_it_is_rewritten(earlier: Path, read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first file, at the last, and at some between, before and behind the commit."""
    replace, remove = Files.replace, Files.remove

    def rewritten(path: Path, limit: float) -> int:
        operations = 0

        def counted(original: Callable[..., None]) -> Callable[..., None]:
            def operation(*args: Any) -> None:
                nonlocal operations
                operations += 1
                if operations > limit:
                    raise Killed
                original(*args)

            return operation

        monkeypatch.setattr(Files, "replace", counted(replace))
        monkeypatch.setattr(Files, "remove", counted(remove))
        Writer(path, {}).close()
        return operations

    total = rewritten(shutil.copytree(earlier, tmp_path / "whole.zarr"), np.inf)
    assert total > 200
    schemas = set()
    for limit in [0, *range(5, total - 1, total // 5), total - 1]:
        path = shutil.copytree(earlier, tmp_path / f"{limit}.zarr")
        with pytest.raises(Killed):
            rewritten(path, limit)
        assert_holds(read(path))
        schemas.add(read(path).attrs["optiscope_schema"])
        rewritten(path, np.inf)
        assert_holds(read(path))
        files = {f.relative_to(path) for f in path.rglob("*") if f.is_file()}
        assert files == {f.relative_to(tmp_path / "whole.zarr") for f in (tmp_path / "whole.zarr").rglob("*") if f.is_file()}
        shutil.rmtree(path)
    assert schemas == {1, SCHEMA}
