"""One set of options: `attach`, the callbacks of trainers and `diag run` take the same, with the same defaults, and refuse the same."""

import dataclasses
import inspect
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import typer
from torch import nn
from torch.optim import SGD

from optiscope.analysis import open_run
from optiscope.cli import app
from optiscope.cli.recording_options import Measure, options_of
from optiscope.cli.startup.sitecustomize import Start
from optiscope.diagnostics.catalogue import ON_REQUEST
from optiscope.diagnostics.options import Options, head_counts
from optiscope.hooks import attach
from optiscope.hooks.huggingface import OptiscopeCallback as OfTransformers
from optiscope.hooks.lightning import OptiscopeCallback as OfLightning

FIELDS = {field.name: field.default for field in dataclasses.fields(Options)}
NOT_TYPED = {"on_error"}  # a script's training is never to be stopped


def keywords(function: Any) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize(("function", "own"), [(attach, {"first_step"}), (OfTransformers, set()), (OfLightning, set())])
def test_signatures_spell_out_the_options(function: Any, own: set[str]) -> None:
    found = keywords(function)
    assert found.keys() - FIELDS.keys() == own
    assert {name: p.default for name, p in found.items() if name not in own} == FIELDS
    assert [name for name in found if name not in own] == list(FIELDS)
    kinds = {field.name: field.type for field in dataclasses.fields(Options)}
    assert {name: p.annotation for name, p in found.items() if name not in own} == kinds


def test_every_option_is_documented() -> None:
    text = inspect.getdoc(attach) or ""
    assert all(re.search(rf"^    {name}: ", text, re.MULTILINE) for name in FIELDS)


def test_diag_run_takes_every_option() -> None:
    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    options = {p.name: p for p in command.params}
    assert FIELDS.keys() - options.keys() == NOT_TYPED
    assert keywords(options_of) == {}
    assert set(inspect.signature(options_of).parameters) == FIELDS.keys() - NOT_TYPED
    assert f"by default {FIELDS['overhead']}" in options["overhead"].help
    assert tuple(Measure) == ON_REQUEST
    assert all(group in options["measure"].help for group in ON_REQUEST)
    assert options_of(None, None, (), (), None, (), False) == {}


@pytest.fixture
def loggers_as_they_were() -> Iterator[None]:
    """What `diag run` sets on loggers is for a process of its own; this one goes on to other tests."""
    loggers = [logging.getLogger(name) for name in ("optiscope", "zarr", "numcodecs", "filelock", "asyncio")]
    before = [(logger, logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, propagate, handlers in before:
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers


@pytest.mark.usefixtures("loggers_as_they_were")
def test_what_is_typed_arrives_at_the_recorder(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "names.txt").write_text("# ours\nmixer$=attn_o\n\n(?=a)=other\n")
    (tmp_path / "names.json").write_text(json.dumps({r"\.p$": "mlp_up", "mixer$": "never"}))
    operators = [r"x=y$=head", str(tmp_path / "names.txt"), str(tmp_path / "names.json")]
    typed = options_of(None, 0.5, ["blocks"], operators, "8,2", ["seed=1"], True)
    made: list[Any] = []
    monkeypatch.setattr("optiscope.hooks.trainers.script_run.ScriptRun.__init__", lambda self, store, options: made.append(options))
    monkeypatch.setattr("optiscope.hooks.trainers.script_run.ScriptRun.before_step", lambda self, optimizer: None)
    Start("run.zarr", json.dumps(typed))._begin(None)
    rule = {"x=y$": "head", "mixer$": "attn_o", "(?=a)": "other", r"\.p$": "mlp_up"}
    groups = ("geometry", "update", "second_moment", "blocks")
    assert made == [Options(overhead=0.5, measure=groups, operators=rule, heads=(8, 2), about={"seed": 1}, background=True)]
    assert list(made[0].operators) == list(rule)  # the first that matches wins


WRONG = {
    "every": [0, -1, 1.5, "3", True, float("nan")],
    "overhead": [0, 2, "0.1", True, float("nan"), None],
    "measure": [(), None, 3, "spectra", ["update", "spectra"], [["update"]]],
    "operators": ["mixer", [("a", "b")], {"(": "attn_q"}, {"a": ""}, {"a": 3}, {3: "attn_q"}],
    "heads": [0, "four", (4, 3), [4, 2, 1], 4.0],
    "background": [None, 1, "yes"],
    "about": [["a"], {"data": None}],
    "ranks": ["all", None, 2],
    "rank_timeout": [0, -1, "10", None, float("inf"), float("nan")],
    "on_error": ["ignore", None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_option_is_named_by_all(name: str, value: Any, tmp_path: Any) -> None:
    assert WRONG.keys() == FIELDS.keys()
    model = nn.Linear(3, 2)
    for make in (
        lambda **option: attach(SGD(model.parameters(), lr=0.1), model, tmp_path / "run.zarr", **option),
        lambda **option: OfTransformers(tmp_path / "run.zarr", **option),
        lambda **option: OfLightning(tmp_path / "run.zarr", **option),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^{name}: expected .*got ") as refused:
            make(**{name: value})
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "run.zarr").exists()


def test_options_are_kept_in_one_form() -> None:
    options = Options(every=2.0, measure="update", heads=4, about=None)  # type: ignore[arg-type]
    assert (options.every, options.measure, options.heads, options.about) == (2, ("update",), (4, 4), {})
    assert Options(**vars(options)) == options
    assert head_counts([8, 2]) == (8, 2)


def test_callbacks_take_the_working_folder_of_when_they_were_made(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    for make, name in ((OfTransformers, "a.zarr"), (OfLightning, "b.zarr")):
        monkeypatch.chdir(tmp_path)
        callback = make(name, every=1)
        monkeypatch.chdir("elsewhere")
        model = nn.Linear(3, 2)
        callback._session.begin(SGD(model.parameters(), lr=0.1), model, 0)
        callback._session.end()
        assert (tmp_path / name / "zarr.json").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_trainer_made_anew_after_an_interrupt_goes_on_in_the_same_run(tmp_path: Any) -> None:
    """The first callback is told of no end, and somebody still holds it: a notebook, a traceback."""
    model = nn.Linear(3, 2)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    callbacks = [OfTransformers(tmp_path / "run.zarr", every=1) for _ in range(2)]
    for callback in callbacks:
        optimizer = SGD(model.parameters(), lr=0.1)
        callback._session.begin(optimizer, model, 0)
        optimizer.step()
    callbacks[1]._session.end()
    assert callbacks[0]._session.recorder.session.watched == []
    assert [path.name for path in tmp_path.iterdir()] == ["run.zarr"]
    assert [len(open_run(tmp_path / "run.zarr")["update"]["step"])] == [2]


def test_two_trainers_of_two_models_disturb_each_other_not(tmp_path: Any) -> None:
    callbacks = []
    for width in (2, 5):
        model = nn.Linear(3, width)
        callback = OfTransformers(tmp_path / "run.zarr", every=1)
        callback._session.begin(SGD(model.parameters(), lr=0.1), model, 0)
        callbacks.append(callback)
    assert [len(callback._session.recorder.session.watched) for callback in callbacks] == [1, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-2.zarr", "run.zarr"]
    for callback in callbacks:
        callback._session.end()
