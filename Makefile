# Everything runs in .venv, which the first target makes. Needs Python 3.11 or newer and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check coverage names clean

# One thread per operation: on few or shared cores, thread pools that wait for each other cost more than they give (a demo beside
# another busy process took ten minutes with two threads).
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

demo: .venv/installed
	$(BIN)/diag demo --overwrite

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Lint, format, and a strict type check of the four folders. Type checkers follow links that spell the namespace out.
check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/ns/optiscope
	for folder in diagnostics hooks analysis cli examples; do ln -sfn ../../../$$folder build/ns/optiscope/$$folder; done
	$(BIN)/mypy -p optiscope.diagnostics -p optiscope.hooks -p optiscope.analysis -p optiscope.cli

# Writes docs/coverage.md from what the contract suite measures; the tests fail when it is stale.
coverage: .venv/installed
	PYTHONPATH=tests/hooks $(BIN)/python -m contract.document

# Writes docs/names.md from what published architectures are called; a test fails when it is stale.
names: .venv/installed
	$(BIN)/python tests/diagnostics/architectures.py

clean:
	rm -rf .venv build demo.zarr demo-analysis demo-schedule.json

# The constraints keep torch at the version they were resolved with; a range would fetch its newest accelerator build.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
