"""What is said of iterations whose inputs are not in the run, of inputs that were zero, and of whom an advice is for."""

import numpy as np
import pytest

from optiscope.analysis import check

SIGMA = np.linspace(1, 0.5, 12)
Q, UP, ADAM = "layers.0.attn.q_proj.weight", "layers.1.mlp.up_proj.weight", "lm_head.weight"


def of_rule(run, rule):
    return [finding for finding in check(run) if finding.rule == rule]


def with_entry(build_run, **entry):
    described = {
        "label": "Nova",
        "class": "lab.Nova",
        "groups": [{"lr": 0.02}],
        "spectrum_of": ["momentum"],
        "read_by": ["names in the state"],
        **entry,
    }
    return build_run({Q: {"sigma": SIGMA, "optimizer": "Nova"}}, attrs={"optimizers": [described]})


def test_an_iteration_on_blocks_is_told(build_run):
    iteration = {"part": "rows", "parts": 4, "count": 1}
    (found,) = of_rule(with_entry(build_run, watched=[{}, {"iterations": [iteration], "matrices": 1}]), "unread_iteration")
    assert found.severity == "info"
    assert "in 4 blocks of rows each" in found.sentence


@pytest.mark.parametrize("holds", [True, False])
def test_a_step_that_could_not_be_watched_is_told_where_the_class_holds_coefficients(build_run, holds):
    found = of_rule(
        with_entry(build_run, watched=[{"failed": "TypeError: cannot pickle a lock", "holds_coefficients": holds}]), "unread_iteration"
    )
    assert [(f.severity, "cannot pickle a lock" in f.sentence) for f in found] == ([("warning", True)] if holds else [])


def test_an_iteration_that_is_read_is_not_told(build_run):
    iteration = {"part": "whole", "parts": 1, "count": 1}
    assert (
        of_rule(
            with_entry(build_run, watched=[{"iterations": [iteration], "matrices": 1}, {"iterations": [], "matrices": 2}]),
            "unread_iteration",
        )
        == []
    )


@pytest.mark.parametrize(
    ("norms", "severity"),
    [((0.0, 1.0, 1.0), "info"), ((0.0, 0.0, 1.0), "warning"), ((1.0, 0.0, 1.0), "warning"), ((0.0, 0.0, 0.0), "warning")],
)
def test_zeros_in_the_first_record_alone_are_a_note(build_run, norms, severity):
    run = build_run({Q: {"sigma": [None if norm == 0 else SIGMA for norm in norms]}})
    norm = run["geometry"]["fro_norm"]
    run["geometry"]["fro_norm"] = norm.copy(data=np.where(np.array(norms)[:, None] == 0, 0.0, norm.values))
    (found,) = of_rule(run, "zero_input")
    assert found.severity == severity


def test_a_vector_that_nobody_orthogonalises_is_not_sent_to_adamw(build_run):
    advice = {}
    for optimizer in ("Muon", "AdamW"):
        (found,) = of_rule(build_run({Q: {"sigma": (1.0,), "shape": (1, 12), "optimizer": optimizer}}), "single_row")
        advice[optimizer] = found.advice
    assert "AdamW" in advice["Muon"]
    assert "AdamW" not in advice["AdamW"]


@pytest.mark.parametrize("has_it", [True, False])
def test_an_argument_is_named_where_the_class_has_it(build_run, has_it):
    settings = {"adjust_lr_fn": None} if has_it else {}
    entry = {"label": "Muon", "class": "lab.Muon", "groups": [settings], "spectrum_of": ["momentum"]}
    matrices = {
        Q: {"sigma": SIGMA, "target": 0.05},
        UP: {"sigma": SIGMA, "target": 0.05, "shape": (36, 12)},
        ADAM: {"sigma": SIGMA, "optimizer": "AdamW"},
    }
    (found,) = of_rule(build_run(matrices, attrs={"optimizers": [entry]}), "rms_not_matched")
    assert ("adjust_lr_fn" in found.advice) == has_it
