"""What is read is data: nothing in the packages turns bytes or text into code, or starts a shell; and what is written is written whole."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path.relative_to(ROOT) for folder in ("diagnostics", "hooks", "analysis", "cli", "examples") for path in (ROOT / folder).rglob("*.py")
)

# Modules that make objects, code or processes of what they are given.
IMPORTS = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "yaml",
    "subprocess",
    "pty",
    "code",
    "codeop",
    "runpy",
    "ctypes",
}
# Called by their bare name, or as an attribute of whatever module.
NAMES = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {"system", "popen", "load_pickle", "read_pickle", "mktemp", "execv", "execve", "execvp", "spawnv", "spawnl", "posix_spawn"}
# Keywords that let a loader run what it loads, or a shell read a command.
KEYWORDS = {("allow_pickle", True), ("weights_only", False), ("shell", True)}

# `diag run` becomes the interpreter of the script that it was given: executing that is what it is for.
# Ranks of one training talk in Python's own objects, over connections that they have made themselves: no file is read so.
ALLOWED = {("cli/run_script.py", "execve"), ("hooks/ranks/words.py", "pickle")}


def forbidden(tree):
    """(line, what) of everything in a module that is in the lists above."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] in IMPORTS)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] in IMPORTS:
            yield node.lineno, node.module
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in NAMES:
                yield node.lineno, called.id
            if isinstance(called, ast.Attribute) and called.attr in ATTRIBUTES:
                yield node.lineno, called.attr
            if (
                isinstance(called, ast.Attribute)
                and called.attr == "load"
                and isinstance(called.value, ast.Name)
                and called.value.id in ("torch", "np", "numpy")
            ):
                said = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
                if said.get("weights_only" if called.value.id == "torch" else "allow_pickle") is not (called.value.id == "torch"):
                    yield node.lineno, f"{called.value.id}.load"
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in KEYWORDS:
                    yield node.lineno, f"{keyword.arg}={keyword.value.value}"


def test_nothing_read_is_executed():
    found = {(str(path), what) for path in FILES for _, what in forbidden(ast.parse((ROOT / path).read_text(encoding="utf-8")))}
    assert found == ALLOWED


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import yaml as y", "import subprocess", "eval(text)", "exec(text)", "__import__(name)", "compile(a, b, c)",
        "os.system(text)", "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path)", "np.load(path, allow_pickle=True)", "f(text, shell=True)",
        "pandas.read_pickle(path)", "tempfile.mktemp()", "os.execv(a, b)",
    ],
)  # fmt: skip
def test_each_would_be_seen(line):
    assert list(forbidden(ast.parse(f"def f():\n    {line}")))


@pytest.mark.parametrize(
    "line", ["re.compile(p)", "torch.load(path, weights_only=True)", "np.load(path, allow_pickle=False)", "Schedule.load(path)"]
)
def test_what_is_harmless_is_left_alone(line):
    assert not list(forbidden(ast.parse(line)))
