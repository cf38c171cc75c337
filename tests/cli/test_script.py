"""`diag run`: a script runs under it as under python, to the byte, and what it trains is recorded."""

import ast
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import pytest

from optiscope.analysis import open_run
from optiscope.analysis.training_curve import training_curve
from optiscope.cli import run_script as script
from optiscope.cli.startup import sitecustomize

SCRIPTS = Path(__file__).with_name("scripts")
PYTHON = [sys.executable]
DIAG_RUN = [sys.executable, "-c", "from optiscope.cli import app; app()", "run"]
NOTHING = "diag run: nothing was recorded: no torch optimizer of this process, with a weight matrix among its parameters, took a step\n"


def start(*command, folder, **environment):
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "PYTHONPATH")}
    return subprocess.Popen(
        list(map(str, command)), cwd=folder, env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process):
    """Exit code, standard output, standard error."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def both(folder, *arguments, options=(), **environment):
    """What a script does under python and under `diag run`, at the same time."""
    plain = start(*PYTHON, *arguments, folder=folder, **environment)
    return ended(start(*DIAG_RUN, *options, *arguments, folder=folder, **environment)), ended(plain)


def operators(run):
    return dict(zip(run["update"]["name"].values.tolist(), run["update"]["operator"].values.tolist(), strict=True))


def steps(run):
    return {group: run[group]["step"].values.tolist() for group in ("update", "geometry", "second_moment") if group in run}


def told(path, records, last):
    return f"diag run: {path} holds {records} records, the last of step {last}\n"


def test_a_gpt_of_the_usual_public_form(tmp_path):
    """Fused attention, tied weights, decay groups, accumulation, clipping, torch.compile, settings through exec."""
    command = SCRIPTS / "train_gpt.py", "--n_head=4", "--compile=True"
    (code, out, err), plain = both(
        tmp_path,
        *command,
        options=[
            "--every",
            2,
            "--measure",
            "blocks",
            "--measure",
            "stacking",
            "--about",
            "seed=1",
            "--about",
            "data=a=b",
            "--about",
            "lr=0.5",
        ],
    )
    assert (code, out) == plain[:2]
    assert out.count("loss 0x") == 6 + 2
    assert (code, err) == (0, plain[2] + told(tmp_path / "run.zarr", 3, 6))
    run = open_run(tmp_path / "run.zarr")
    assert steps(run) == {group: [2, 4, 6] for group in ("update", "geometry", "second_moment")}
    assert run.attrs["about"] == {"seed": 1, "data": "a=b", "lr": 0.5}
    # What was asked for beside them; the model does not tell its heads.
    fused = [f"transformer.h.{i}.attn.c_attn.weight[{part}]" for i in range(2) for part in "qkv"]
    assert run["blocks"]["name"].values.tolist() == fused
    assert run["stacking"].sizes["matrix"] == 4
    assert "gradient" not in run
    layers = {
        f"transformer.h.{i}.{name}.weight": operator
        for i in range(2)
        for name, operator in {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_o", "mlp.c_fc": "mlp_fc", "mlp.c_proj": "mlp_proj"}.items()
    }
    assert operators(run) == {"transformer.wte.weight": "embed", "transformer.wpe.weight": "embed", **layers}
    assert run["update"]["update_rms"].notnull().all()


def test_optimizers_made_in_another_module(record, tmp_path):
    """Run as a module, in place of an older run, by the first process of a node that is not the first."""
    record(tmp_path / "run.zarr", steps=2)
    (tmp_path / "names.txt").write_text("up_proj=mine\n")
    options = "--overwrite", "--every", 1, "--output", tmp_path / "run.zarr", "--heads", "4,2", "--operators", tmp_path / "names.txt"
    (code, out, err), plain = both(SCRIPTS, "-m", "train_parts", options=options, RANK="0", LOCAL_RANK="1")
    assert (code, out, plain[2]) == (0, plain[1], "")
    assert out.count("0x") == 5 + 1 + 18
    assert err == told(tmp_path / "run.zarr", 5, 5)
    run = open_run(tmp_path / "run.zarr")
    assert steps(run)["update"] == [1, 2, 3, 4, 5]
    names = {f"{x}_proj": f"attn_{x}" for x in "qkvo"} | {f"{x}_proj": f"mlp_{x}" for x in ("gate", "down")} | {"up_proj": "mine"}
    hidden = {f"layers.{i}.{name}.weight": operator for i in range(2) for name, operator in names.items()}
    assert operators(run) == {**hidden, "embed_tokens.weight": "embed", "lm_head.weight": "head"}
    by = dict(zip(run["update"]["name"].values.tolist(), run["update"]["optimizer"].values.tolist(), strict=True))
    assert {name for name, optimizer in by.items() if optimizer == "Muon"} == hidden.keys()
    assert run["update"]["update_rms"].notnull().all()
    heads = dict(zip(run["update"]["name"].values.tolist(), run["update"]["kv_heads"].values.tolist(), strict=True))
    assert {heads[f"layers.0.{x}_proj.weight"] for x in "qkvo"} == {2}


def test_workers_late_optimizers_logging_and_an_exception(tmp_path):
    process = start(*DIAG_RUN, "--every", 1, SCRIPTS / "train_workers.py", folder=tmp_path)
    code, out, err = ended(process)
    # 0+1+2+3 and 4+5+6+7, four times each.
    sums = [f"{context} {module} {total}.0" for context in ("fork", "spawn") for module, total in (("__main__", 24), ("__main__", 88))]
    assert out.splitlines() == [*sums, "8 1"]
    assert code == 1
    traceback, summary = err.rsplit("diag run: ", 1)
    assert traceback.startswith("Traceback (most recent call last):\n")
    assert traceback.endswith("ValueError: enough\n")
    assert [line.split(", in ")[1] for line in traceback.splitlines() if line.startswith("  File ")] == ["<module>", "main"]
    run = open_run(tmp_path / "run.zarr")
    assert summary.startswith(f"{tmp_path / 'run.zarr'} holds {len(steps(run)['update'])} records")
    assert operators(run).keys() == {"0.weight", "1.weight"}
    # The late one is met in the third step, whose record is complete by then: four steps are counted, and it is in the last record.
    assert steps(run)["update"] == [1, 2, 3, 4]
    updates = run["update"]["update_rms"].notnull().sum("step").values.tolist()
    assert dict(zip(run["update"]["optimizer"].values.tolist(), updates, strict=True)) == {"SGD": 4, "AdamW": 1}


def test_an_interrupted_training_keeps_its_records(tmp_path):
    process = start(*DIAG_RUN, "--every", 1, SCRIPTS / "train_forever.py", folder=tmp_path)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    code, out, err = ended(process)
    assert (code, out) == (-signal.SIGINT, "")
    assert err.endswith(f"KeyboardInterrupt\n{told(tmp_path / 'run.zarr', 3, 3)}")
    assert steps(open_run(tmp_path / "run.zarr"))["update"] == [1, 2, 3]


def test_what_a_script_logs_is_recorded_and_its_libraries_are_left_as_they_are(tmp_path):
    (code, out, err), plain = both(tmp_path, SCRIPTS / "train_logging.py", options=["--every", 1])
    assert (code, out, plain[2]) == (0, plain[1], "")
    *trouble, summary = err.splitlines(keepends=True)
    assert summary == told(tmp_path / "run.zarr", 3, 3)
    assert [line.split("(")[0] for line in trouble] == ["optiscope: recording failed at step 0 "]  # the script's own "no number"
    run = open_run(tmp_path / "run.zarr")
    assert run["update"]["name"].values.tolist() == ["G.weight", "D.weight"]
    scalars = run["scalars"].to_dataset().load()
    logged = {name: scalars[name].dropna("step") for name in scalars.data_vars if not name.endswith("_seconds")}
    by_step = {name: dict(zip(values["step"].values.tolist(), values.values.tolist(), strict=True)) for name, values in logged.items()}
    losses = by_step.pop("train.loss")
    assert list(losses) == [1, 2, 3]
    assert by_step.pop("mine.x") == pytest.approx(losses)
    assert by_step == {
        "own": {0: 1.0, 1: 0.0, 2: 1.0, 3: 2.0},
        "early.loss": {0: 7.5},
        "train.lr": {1: 0.1, 2: 0.1, 3: 0.1},
        "both.a": {1: 0.0, 2: 1.0, 3: 2.0},
        "both.b": {1: 2.0, 2: 2.0, 3: 2.0},
        "val.loss": {1: 0.5, 2: 1.5, 3: 2.5},
        "acc": {1: 0.0, 2: 1.0, 3: 2.0},
    }
    assert training_curve(run).attrs["loss_name"] == "train.loss"


def test_libraries_of_another_make_cost_one_line(tmp_path):
    folder = tmp_path / "wandb" / "sdk"
    folder.mkdir(parents=True)
    (folder / "wandb_run.py").write_text("class Run: pass")
    (tmp_path / "ask.py").write_text("import sys, wandb.sdk.wandb_run\nprint(wandb.sdk.wandb_run.Run().__dict__)")
    (code, out, err), plain = both(tmp_path, "ask.py")
    assert (code, out) == plain[:2] == (0, "{}\n")
    assert err == "diag run: numbers that the script logs with wandb.sdk.wandb_run are not recorded (KeyError: 'log')\n" + NOTHING


def parameters_of_functions(path):
    """By class and name the parameters of every function in a file, without importing it."""
    found = {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for owner in (tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))):
        for node in owner.body:
            if isinstance(node, ast.FunctionDef):
                found[getattr(owner, "name", ""), node.name] = [argument.arg for argument in node.args.args]
    return found


def test_what_is_wrapped_has_the_parameters_that_are_read():
    torch_folder = Path(find_spec("torch").origin).parents[1]
    for name, functions in sitecustomize.LIBRARIES.items():
        path = (torch_folder if name.startswith("torch.") else SCRIPTS / "loggers").joinpath(*name.split("."))
        found = parameters_of_functions(path.with_suffix(".py"))
        for kind, function, parameters in functions:
            given = found[kind, function]
            assert given[1 if kind else 0 :][: len(parameters)] == list(parameters)


def test_the_libraries_functions_are_put_back(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS / "loggers")
    for name in ("mlflow", "mlflow.tracking", "mlflow.tracking.fluent"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    finders = list(sys.meta_path)
    logged = sitecustomize.Logged()
    logged.wait()
    import mlflow.tracking.fluent as fluent

    wrapped, plain = fluent.log_metric, fluent.log_metric.__wrapped__
    fluent.log_metrics = len  # by somebody else, since
    logged.end()
    assert sys.meta_path == finders
    assert (fluent.log_metric, fluent.log_metrics) == (plain, len)
    assert wrapped("a", 1) == "logged a"
    for name in ("mlflow", "mlflow.tracking", "mlflow.tracking.fluent"):
        monkeypatch.delitem(sys.modules, name)


def test_numbers_of_a_call_that_logs():
    class Odd(dict):
        def items(self):
            raise ValueError("asked")

    loop = {}
    loop["loop"] = loop
    values = {"a": 1, "b": {"c": True, 3: 2.5}, "d": "text", "e": None, "f": [1], "g": 1j, "h": Odd(x=1)}
    found = sitecustomize.numbers_of_call
    assert found(("data",), (values,), {"step": 3}) == {"a": 1, "b/c": True, "b/3": 2.5}
    assert found(("tag", "scalar_value"), ("x",), {"scalar_value": 2}) == {"x": 2}
    assert found(("tag", "scalar_value"), ("x",), {}) == found(("data",), (loop,), {}) == {}


def test_every_training_of_a_script_has_a_run_and_short_ones_are_counted(tmp_path):
    code, out, err = ended(start(*DIAG_RUN, "--every", 1, SCRIPTS / "train_probes.py", folder=tmp_path))
    assert (code, out) == (0, "")
    stores = {"run.zarr": 12, "run-2.zarr": 13, "run-3.zarr": 14}
    told_of = "; ".join(f"{tmp_path / name} holds {last} records, the last of step {last}" for name, last in stores.items())
    assert err == f"diag run: {told_of}; 2 short-lived optimizers (of at most 10 steps) were passed over\n"
    assert {path.name for path in tmp_path.iterdir()} == stores.keys()


# Without torch from here on: what surrounds a script.


def test_a_rank_that_does_not_record_is_plain_python(record, tmp_path):
    record(tmp_path / "run.zarr", steps=1)
    before = (tmp_path / "run.zarr" / "zarr.json").read_bytes()
    for ranks in ({"RANK": "1", "LOCAL_RANK": "0"}, {"LOCAL_RANK": "2"}):
        under, plain = both(tmp_path, SCRIPTS / "look_around.py", "exit", "0", options=["--overwrite"], **ranks)
        assert under == plain
    assert (tmp_path / "run.zarr" / "zarr.json").read_bytes() == before


TORCH = {  # as much of it as is seen before a step
    "__init__.py": "",
    "_compile.py": "def _disable_dynamo(function): return function",
    "optim/__init__.py": "from .optimizer import step\ndel optimizer",
    "optim/optimizer.py": """
        from torch.utils.hooks import RemovableHandle
        hooks = {}
        def register_optimizer_step_pre_hook(hook):
            handle = RemovableHandle(hooks)
            hooks[handle.id] = hook
            return handle
        def step(optimizer):
            return [hook(optimizer, (), {}) for hook in list(hooks.values())]
    """,
    "utils/__init__.py": "",
    "utils/hooks.py": """
        class RemovableHandle:
            id = 0
            def __init__(self, hooks): self.hooks = hooks
            def remove(self): self.hooks.clear()
    """,
}
ASK = """
import importlib, pickle, sys
finders = list(sys.meta_path)
import torch.optim
assert len(sys.meta_path) == len(finders) - 1
optimizer = sys.modules["torch.optim.optimizer"]
assert set(vars(optimizer.__spec__.loader)) == {"name", "path"} and optimizer.__loader__ is optimizer.__spec__.loader
print(torch.optim.step(object()), torch.optim.step(object()), len(optimizer.hooks))
print(importlib.reload(optimizer).step(object()), pickle.loads(pickle.dumps(optimizer.step)) is optimizer.step)
"""


def test_waiting_for_torch_leaves_nothing_behind_and_trouble_is_one_line(tmp_path):
    """With a stand-in for torch, in which Optiscope itself cannot be imported."""
    for name, text in TORCH.items():
        (tmp_path / "torch" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "torch" / name).write_text(dedent(text))
    (tmp_path / "ask.py").write_text(ASK)
    code, out, err = ended(start(*DIAG_RUN, "ask.py", folder=tmp_path))
    assert (code, out) == (0, "[None] [] 0\n[] True\n")
    assert err.startswith("diag run: no further optimizer is recorded (ImportError: cannot import name ")
    assert err.endswith("; the script goes on\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["look_around.py", "exit", "3", "-o", "mine", "--", "--every", "x y", ""], 3),
        (["./look_around.py"], 0),
        (["-m", "look_around", "exit", "5", "-m", "--help"], 5),
        (["look_around.py", "fail"], 1),
        (["-m", "look_around", "fail"], 1),
        (["-m", "nowhere"], 1),
        (["broken.py"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_script_sees_and_does_what_it_would_without(tmp_path, arguments, code):
    shutil.copy(SCRIPTS / "look_around.py", tmp_path)
    (tmp_path / "broken.py").write_text("print('never'\n")
    (recorded, out, err), plain = both(tmp_path, *arguments)
    assert plain[0] == code
    assert (recorded, out, err) == (code, plain[1], plain[2] + NOTHING)
    assert "atexit" in sys.builtin_module_names  # the one module more that is loaded hides none of a script's own
    assert not (tmp_path / "run.zarr").exists()


def test_the_environments_own_start_is_kept(tmp_path):
    own = tmp_path / "own" / "sitecustomize.py"
    own.parent.mkdir()
    own.write_text("import builtins; builtins.customised = __file__")
    (tmp_path / "ask.py").write_text("import os, sys; print(customised, os.environ['PYTHONPATH'], sys.path, sys.modules['sitecustomize'])")
    (code, out, err), plain = both(tmp_path, "ask.py", PYTHONPATH="own")
    assert (code, out, err) == (0, plain[1], NOTHING)
    assert out.startswith(f"{own} own ")
    # One that fails is told of, once by the interpreter of `diag` and once by the script's.
    own.write_text("import nothing_of_this_name")
    (code, out, err), plain = both(tmp_path, SCRIPTS / "look_around.py", PYTHONPATH="own")
    trouble = "Error in sitecustomize; set PYTHONVERBOSE for traceback:\nModuleNotFoundError: No module named 'nothing_of_this_name'\n"
    assert plain[2] == f"{trouble}on standard error\n"
    assert (code, out, err) == (0, plain[1], trouble + plain[2] + NOTHING)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_script(tmp_path, number):
    processes = [start(*command, SCRIPTS / "look_around.py", "wait", folder=tmp_path) for command in (PYTHON, DIAG_RUN)]
    for process in processes:
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None
        process.send_signal(number)
    plain, under = (
        # Which of two lines it reached is a matter of chance.
        (code, out, [line for line in err.splitlines(keepends=True) if not line.startswith("  ")])
        for code, out, err in map(ended, processes)
    )
    assert under == (-number, plain[1], plain[2] + ([NOTHING] if number == signal.SIGINT else []))


@pytest.fixture
def stays(monkeypatch):
    """Should a refusal be missing, this process is not to become the script."""

    def replaced(*_):
        raise AssertionError("the script was started")

    monkeypatch.setattr(os, "execve", replaced)


REFUSED = {
    "script: expected a Python script to run, for example diag run train.py, or diag run -m package.train": [],
    "script: nowhere.py does not exist": ["nowhere.py"],
    "--every: expected a number of steps of at least 1, got 0": ["--every", "0", "train.py"],
    "--overhead: expected a share of the training time above 0 and up to 1, got 1.5": ["--overhead", "1.5", "train.py"],
    "--overhead: expected a share of the training time above 0 and up to 1, got nan": ["--overhead", "nan", "train.py"],
    "--heads: expected N, or N,M for query heads and key/value heads, for example 32,8; got 'many'": ["--heads", "many", "train.py"],
    "--heads: expected a positive number, or (query heads, key/value heads) with the second dividing the first; got [8, 3]": [
        "--heads",
        "8,3",
        "train.py",
    ],
    r"--operators: expected a file, or REGEX=OPERATOR such as 'mixer\.in$=attn_qkv'; there is no file nowhere.txt": [
        "--operators",
        "nowhere.txt",
        "train.py",
    ],
    r"--operators: expected REGEX=OPERATOR, for example 'mixer\.in$=attn_qkv', got 'mixer='": ["--operators", "mixer=", "train.py"],
    "--operators: expected a regular expression, got '(' (missing ), unterminated subpattern at position 0)": [
        "--operators",
        "(=head",
        "train.py",
    ],
    "--operators: names.json: expected one JSON object, {REGEX: OPERATOR, …}, or lines REGEX=OPERATOR (": [
        "--operators",
        "names.json",
        "train.py",
    ],
    "--every and --overhead: expected one of them, got both": ["--every", "1", "--overhead", "0.1", "train.py"],
    "--about: expected NAME=VALUE, for example seed=0, got 'seed'": ["--about", "seed", "train.py"],
    "run: photos is not an Optiscope run": ["--overwrite", "-o", "photos", "train.py"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_run_is_refused_in_a_sentence(diag, stays, tmp_path, monkeypatch, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    (tmp_path / "names.json").write_text("{'single': 'quotes'}")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_text("dear")
    result = diag("run", *REFUSED[message])
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert result.stderr.startswith(f"diag: {message}")
    assert (tmp_path / "photos" / "1.jpg").read_text() == "dear"


@pytest.mark.parametrize("arguments", [["--every", "often", "train.py"], ["--lr", "3", "train.py"], ["--measure", "spectra", "train.py"]])
def test_the_parser_refuses_what_is_no_option_of_ours_before_the_script(diag, stays, arguments):
    result = diag("run", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr


def test_the_folder_in_front_of_a_scripts_path_hides_no_other_module():
    assert {path.name for path in script.STARTUP.glob("*.*")} == {"__init__.py", "sitecustomize.py"}
    assert Path(sitecustomize.__file__).parent == script.STARTUP
