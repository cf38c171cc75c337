"""`diag verify`: what it says and its exit codes; and files of strangers, which end in a sentence."""

import json
import shutil


def flip(file):
    content = bytearray(file.read_bytes())
    content[20] ^= 4
    file.write_bytes(content)


def test_whole_damaged_repaired_unreadable(diag, recorded, tmp_path):
    run = tmp_path / "run.zarr"
    shutil.copytree(recorded, run)
    result = diag("verify", run)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "whole; " in result.stdout
    flip(run / "geometry/fro_norm/c/0/0")
    result = diag("verify", run)
    assert result.exit_code == 1
    assert "flipped bit: geometry/fro_norm/c/0/0; records of steps 1 to 12; " in result.stdout
    said = json.loads(diag("verify", run, "--json").stdout)
    assert (said["whole"], said["damage"][0]["kind"], said["damage"][0]["steps"]) == (False, "flipped bit", [1, 12])
    result = diag("verify", run, "--repair")
    assert result.exit_code == 0
    assert "repaired: geometry/fro_norm/c/0/0: geometry/fro_norm is missing in the records of steps 1 to 12" in result.stdout
    assert diag("verify", run).exit_code == 0
    assert diag("info", run).exit_code == 0
    result = diag("verify", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("diag: run: ")


def test_json_of_a_stranger_ends_in_a_sentence(diag, recorded, tmp_path):
    run, file = tmp_path / "run.zarr", tmp_path / "x.json"
    shutil.copytree(recorded, run)
    for content in (
        b"[" * 100_000,
        b"[[1e999, NaN, 0]]",
        b'["\\ud800"]',
        b"[[1" + b"0" * 5000 + b", 0, 0]]",
        b"[" + b"[1,1,1]," * 400_000 + b"0]",
    ):
        file.write_bytes(content)
        (run / "zarr.json").write_bytes(content)
        for command in (("ns", "validate", file), ("info", run)):
            result = diag(*command)
            assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
            assert result.stderr.startswith("diag: ")


def test_ten_thousand_decisions_do_not_fill_a_terminal(diag, recorded, tmp_path):
    from optiscope.diagnostics.store.format import seal

    run = tmp_path / "run.zarr"
    shutil.copytree(recorded, run)
    document = json.loads((run / "zarr.json").read_text())
    decisions = [{"step": step, "optimizer": "Muon", "kind": "keep", "why": "so", "steps": None} for step in range(10_000)]
    document["attributes"]["decisions"] = decisions
    document["attributes"]["checksum"] = seal(document)
    (run / "zarr.json").write_text(json.dumps(document))
    lines = diag("info", run).stdout.splitlines()
    assert len(lines) < 1_100
    assert "decisions: 1000 of 10000; --json has all" in lines
    assert json.loads(diag("info", run, "--json").stdout)["decisions"] == decisions


def test_what_a_close_left_out_is_compacted(diag, recorded, tmp_path):
    import numpy as np

    from optiscope.diagnostics.store.writer import Writer

    run = tmp_path / "run.zarr"
    writer = Writer(run, {"optimizers": []})
    names = np.array(["a", "b"], np.dtypes.StringDType())
    writer.create_group("update", {"name": names, "operator": names, "rows": np.ones(2, int), "cols": np.ones(2, int)}, {})
    writer.create_array("update", "lr", (2,), ("matrix",), "float64", {})
    for step in range(1100):
        writer.append("update", step, {"lr": np.full(2, step)})
    writer.close()
    assert json.loads(diag("verify", run, "--json").stdout)["compacted"] == 0
    result = diag("verify", run, "--compact")
    assert (result.exit_code, "compacted: 1 array\n" in result.stdout) == (0, True)
    assert sorted(path.name for path in (run / "update" / "lr").iterdir()) == ["c.0.0", "c.1.0", "zarr.json"]
    result = diag("verify", run, "--compact")
    assert "compacted: nothing, for no array of more than 1,024 records is left to be" in result.stdout
    flip(run / "update" / "lr" / "c.1.0")
    result = diag("verify", run, "--compact")
    assert (result.exit_code, "compacted: nothing, for what is damaged is repaired first: --repair" in result.stdout) == (1, True)
    assert json.loads(diag("verify", run, "--repair", "--compact", "--json").stdout)["compacted"] == 0
