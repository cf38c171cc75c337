"""The demo: it trains, records, analyses and derives; and it never replaces what is not a run."""

from dataclasses import replace

import pytest

from optiscope.analysis import STUDIES, open_run
from optiscope.diagnostics import Schedule
from optiscope.examples import byte_llama


def test_the_demo_learns(demo, strict_json):
    _, result = demo
    assert (result.exit_code, result.stderr) == (0, "")
    before, after = strict_json(result.stdout)["validation_loss"]
    # log 256 = 5.55 nats is a uniform guess among bytes; 300 steps of the small model reach about 1.7.
    assert 5 < before < 6
    assert after < 3


def test_the_demo_records_what_it_says(demo, strict_json):
    folder, result = demo
    said = strict_json(result.stdout)
    assert said["run"] == str(folder / "demo.zarr")
    run = open_run(said["run"])
    assert run.attrs["about"].keys() == {"data", "tokens_per_step", "seed", "budget"}
    assert run["geometry"]["step"].values.tolist() == list(range(10, 301, 10))
    scalars = run["scalars"].to_dataset()
    assert float(scalars["validation_loss"][-1]) == said["validation_loss"][1]
    assert float(scalars["loss"][-20:].mean()) < 0.5 * float(scalars["loss"][:20].mean())
    assert set(run["geometry"]["operator"].values.tolist()) == {f"attn_{x}" for x in "qkvo"} | {f"mlp_{x}" for x in ("gate", "up", "down")}


def test_the_demo_analyses_and_schedules(demo, strict_json):
    folder, result = demo
    said = strict_json(result.stdout)
    assert sorted(path.name for path in folder.iterdir()) == ["demo-analysis", "demo-schedule.json", "demo.zarr"]
    skipped = {name for name, study in said["analysis"]["studies"].items() if study["skipped"]}
    # Of optimizers that the demo has none of (ARO, MARS, SOAP, Sophia), and of weight decay, which it trains without.
    assert skipped == {"rotation", "gradient_correction", "soap_basis", "sophia_clip", "weight_decay"}
    assert (folder / "demo-analysis" / "summary.json").exists()
    schedule = Schedule.load(said["schedule"])
    assert set(schedule.operators) == {f"attn_{x}" for x in "qkvo"} | {f"mlp_{x}" for x in ("gate", "up", "down")}


def test_the_demos_run_is_clean(demo, diag):
    folder, _ = demo
    assert diag("check", folder / "demo.zarr").exit_code == 0


@pytest.fixture
def three_steps(monkeypatch):
    monkeypatch.setattr(byte_llama, "SHORT", replace(byte_llama.SHORT, steps=3, every=1))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_replaced_only_when_told(diag, record, tmp_path, three_steps):
    path = record(tmp_path / "demo.zarr", steps=2)
    before = contents(tmp_path)
    refused = diag("demo", "--short", "-o", path)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr == f"diag: --output: {path} already holds a run; add --overwrite, or choose another path\n"
    assert contents(tmp_path) == before
    result = diag("demo", "--short", "-o", path, "--overwrite")
    assert (result.exit_code, result.stderr) == (0, "")
    assert open_run(path)["geometry"]["step"].values.tolist() == [1, 2, 3]
    said = dict(line.split(": ", 1) for line in result.stdout.splitlines() if ": " in line)
    assert said["trained"].startswith("3 steps, validation loss 5.")
    assert said.keys() >= {*STUDIES, "predicted mean residual", "schedule", "next"}


def test_what_is_no_run_is_never_replaced(diag, tmp_path, three_steps):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_text("dear")
    (tmp_path / "thesis").write_text("dear")
    before = contents(tmp_path)
    for name in ("photos", "thesis"):
        for options in ([], ["--overwrite"]):
            result = diag("demo", "--short", "-o", tmp_path / name, *options)
            assert (result.exit_code, result.stdout) == (2, "")
            assert f"{tmp_path / name} is not an Optiscope run" in result.stderr
    assert contents(tmp_path) == before
