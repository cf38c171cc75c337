"""What commands import: torch only where a training is run, and next to nothing before there is something to do."""

import json
import shutil
import subprocess
import sys

import typer

from optiscope.cli import app

# Every command that does not train, as a user would call it on RUN; those that do are named.
ARGUMENTS = {
    "info": [["info", "RUN"]],
    "analyze": [["analyze", "RUN", "-o", "analysis", "--study", "kappa_by_operator"]],
    "check": [["check", "RUN"]],
    "compare": [["compare", "RUN", "COPY.zarr"]],
    "schedule": [["schedule", "RUN"]],
    "what-if": [["what-if", "RUN", "--by-operator"]],
    "report": [["report", "RUN"]],
    "ns": [["ns"]],
    "verify": [["verify", "RUN"]],
}
TRAIN = {"demo", "run"}
CODE = """
import json, sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is not to be imported here")
sys.meta_path.insert(0, NoTorch())
import typer
from optiscope.cli import app
commands = typer.main.get_command(app)
said = {}
for arguments in json.loads(sys.argv[1]):
    try:
        code = commands.main(arguments, standalone_mode=False)
    except SystemExit as end:
        code = end.code
    said[" ".join(arguments)] = code or 0
print(json.dumps({"said": said, "torch": [name for name in sys.modules if name.split(".")[0] == "torch"]}), file=sys.stderr)
"""


def test_no_command_that_does_not_train_imports_torch(recorded, tmp_path):
    commands = set(typer.main.get_command(app).commands)
    assert commands - TRAIN <= ARGUMENTS.keys()  # a new one belongs here, or there
    shutil.copytree(recorded, tmp_path / "COPY.zarr")
    calls = [
        [str(recorded) if argument == "RUN" else argument for argument in call]
        for name in sorted(commands - TRAIN)
        for call in ARGUMENTS[name]
    ]
    done = subprocess.run([sys.executable, "-c", CODE, json.dumps(calls)], cwd=tmp_path, capture_output=True, text=True, check=True)
    found = json.loads(done.stderr.strip().splitlines()[-1])
    assert all(code in (0, 1) for code in found["said"].values()), done.stderr  # `check` may have findings
    assert len(found["said"]) == len(calls)
    assert found["torch"] == []


def test_help_is_plain_and_loads_nothing_that_draws_it():
    code = "import sys\nfrom optiscope.cli import app\ntry: app(['--help'])\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"rich", "pydantic", "numpy"} & set(done.stderr.split())
    assert all(name in done.stdout for name in ARGUMENTS.keys() - {"verify"} | TRAIN)
