"""The recipes of docs/distributed.md run as they are written, on two ranks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from optiscope.analysis import open_run

PAGE = (Path(__file__).parents[3] / "docs" / "distributed.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^### (.+?)\n(?:(?!^#).)*?```python\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))
MATRICES = {"Keller Jordan's Muon": {"0.weight", "2.weight", "3.weight"}}


def torchrun(tmp_path, *command):
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    assert "optiscope:" not in launched.stderr, launched.stderr
    return open_run(tmp_path / "run.zarr")


def test_there_are_recipes():
    assert len(RECIPES) == 5


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_as_written(recipe, tmp_path):
    (tmp_path / "train.py").write_text(RECIPES[recipe])
    run = torchrun(tmp_path, "train.py")
    assert run["update"]["step"].values.tolist() == [2, 4, 6]
    assert set(run["update"]["name"].values.tolist()) == MATRICES.get(recipe, {"0.weight", "2.weight"})
    assert bool((run["update"]["update_rms"] > 0).all())
    assert bool((run["geometry"]["condition_number"] >= 1).all())
    assert run.attrs["ranks"]["world_size"] == 2


def test_a_script_that_knows_nothing_of_it(tmp_path):
    plain = re.sub(r"with attach\(.*?\):\n", "if True:\n", RECIPES["Tensor parallel"]).replace("from optiscope.hooks import attach\n", "")
    (tmp_path / "train.py").write_text(plain)
    diag = Path(sys.executable).with_name("diag")
    run = torchrun(tmp_path, "--no-python", str(diag), "run", "--every", "2", "--ranks", "auto", "train.py")
    assert run["update"]["step"].values.tolist() == [2, 4, 6]
    assert run["update"]["name"].values.tolist() == ["0.weight", "2.weight"]
