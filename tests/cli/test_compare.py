"""`diag compare`, on two runs that the recorder wrote."""

import pandas as pd


def test_two_runs_are_compared(diag, recorded, record, tmp_path, strict_json):
    other = record(tmp_path / "other.zarr", muon=False)
    result = diag("compare", recorded, other, "-o", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "compare: Whether the comparison is fair is not known (data, tokens_per_step" in result.stdout
    assert "nan" not in result.stdout
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert list(pd.read_csv(tmp_path / "out" / "compare.run.csv")["run"]) == ["run", "other"]
    said = strict_json(diag("compare", recorded, other, "--baseline", "other", "--json").stdout)
    assert said["attributes"]["baseline"] == "other"
    assert said["runs"]["other"]["saved"] == {"steps": 0.0, "tokens": None, "seconds": 0.0}
    assert said["conditions"]["matrices"]["verdict"] == "same"
    by_path = strict_json(diag("compare", recorded, other, "--baseline", other, "--target-loss", "1e9", "--json").stdout)
    assert (by_path["attributes"]["baseline"], by_path["attributes"]["target"]) == ("other", 1e9)


def test_what_cannot_be_compared_is_told_in_a_sentence(diag, recorded):
    for arguments, message in {
        (recorded,): "diag: runs: expected two or more to compare, got 1\n",
        (recorded, recorded): "diag: runs: expected different runs, got the same one twice\n",
    }.items():
        result = diag("compare", *arguments)
        assert (result.exit_code, result.stdout, result.stderr) == (2, "", message)
