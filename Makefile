# Two commands: `make demo` and `make test`. Both set everything up in .venv first.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
# processes that share the tests: one more than two cores have, since a quarter of the time is spent waiting (for a lost
# machine, a browser, a database); and threads of each: PyTorch's own would stand in each other's way
JOBS   ?= 3
# bytecode is kept, whatever the shell says: compiling every test anew takes as long as running many of them
TESTS   = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(JOBS) --dist loadfile
DEMO   := $(VENV)/.demo
STAMP  := $(VENV)/.installed
# not --quiet: pip's list of what it downloads is the sign that the install goes on
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check docs gpu setup lint types unit quick clean help

help:  ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(STAMP)  ## virtual environment with everything the tests and the docs need (about five minutes)

# what the demo needs is less than half of what the tests need, and is there first
$(DEMO): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "nearfar needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	@echo "a virtual environment in $(VENV) (a few seconds)"
	@$(PYTHON) -m venv $(VENV)
	@echo "PyTorch (the largest download; about a minute on a fast line)"
	@$(PIP) torch
	@echo "nearfar with what its demo needs (about a minute more)"
	@$(PIP) --editable '.[molecules]'
	@touch $@

$(STAMP): $(DEMO)
	@echo "what the tests, the docs and the other systems need (about two minutes more)"
	@$(PIP) --editable '.[dev]'
	@echo "installed in $(VENV); the next make does not install again"
	@touch $@

demo: $(DEMO)  ## train on 20,000 real molecules, random against hard batches, and compare (about 6 minutes)
	@echo "six runs, two at a time: about 6 minutes on two idle cores; then the comparison"
	$(BIN)/nearfar train --multirun experiment=molecules_demo sampler=random,hard seed=0,1,2 \
	    hydra/launcher=joblib hydra.launcher.n_jobs=2
	$(BIN)/nearfar compare runs/molecules_demo --baseline sampler=random

test: setup lint types unit  ## lint, types and tests

check: setup lint types quick  ## lint, types and the tests of less than a twentieth of a second (about two minutes)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

unit: setup
	$(TESTS)

# none of these waits, so that a third process would only collect the tests once more
quick: JOBS = 2
quick: setup
	$(TESTS) -m "not slow"

docs: setup  ## the documentation as a site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "read and search it at http://localhost:8001/ with: $(BIN)/python -m http.server -d site 8001"

gpu: setup  ## what only a CUDA card can tell: right, how fast, how much memory (under 8 minutes); runs/gpu/gpu.md
	$(BIN)/python benchmarks/gpu.py

clean:  ## remove the environment and every run
	rm -rf $(VENV) runs site .pytest_cache .mypy_cache .ruff_cache
