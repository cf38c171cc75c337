"""A watched step that does something else than the row of its class is a finding; one that agrees, or was not told, is none."""

import numpy as np
import pytest

from optiscope.analysis import check

STEPS = "it runs 6 Newton–Schulz steps, not 5"


@pytest.mark.parametrize(
    ("watched", "told"),
    [([{}, {"differs_from_row": [STEPS]}], [STEPS]), ([{"differs_from_row": []}], []), ([{}], []), (None, [])],
)
def test_a_difference_is_told_once(build_run, watched, told):
    entry = {"label": "Muon", "class": "lab.Muon", "groups": [{"lr": 0.02}], "spectrum_of": ["momentum"], "read_by": ["table"]}
    run = build_run(
        {"layers.0.attn.q_proj.weight": {"sigma": np.linspace(1, 0.5, 12), "optimizer": "Muon"}},
        attrs={"optimizers": [entry if watched is None else {**entry, "watched": watched}]},
    )
    found = [finding for finding in check(run) if finding.rule == "row_differs"]
    assert [(f.severity, f.numbers) for f in found] == [("warning", {"differences": 1})] * len(told)
    assert all(text in f.sentence for text, f in zip(told, found, strict=True))
