# Everything runs in an environment of this checkout's own, .venv, which is made on first use.
# Needed before: Python 3.10 or newer (with venv) and the network.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# What pip is to install: the extras named in the arguments, as pyproject.toml lists them. The project itself is never
# installed (its nodes/ would become a top-level package and hide ComfyUI's own). Python 3.10 has no tomllib; pip has one.
define EXTRAS
import sys
try:
    import tomllib
except ModuleNotFoundError:
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
for extra in sys.argv[1:]:
    sys.stdout.write("\n".join(extras[extra]) + "\n")
endef
export EXTRAS

define CHECK_PYTHON
import sys
found = "%d.%d" % sys.version_info[:2]
sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, and this is %s.\nName another: make PYTHON=python3.12 ..." % found)
endef
export CHECK_PYTHON

.PHONY: help demo test lint bench clean

help:  ## this list
	@awk -F ':.*## *' '/^[a-z]+:.*##/ { printf "  make %-6s %s\n", $$1, $$2 }' Makefile

demo: $(READY)  ## what the built-in Lance Nano draws, edits, moves and answers, into demo/
	$(BIN)/python tests/demo/make_demo.py

# One thread a process: the tests' tensors are too small to share. A file's tests stay together, with their ComfyUI;
# each process may have one, hence no more than four.
IN_PROCESSES := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(READY)  ## all tests; make test PYTEST_ARGS="-x -k parity" passes arguments on
	OMP_NUM_THREADS=1 $(BIN)/pytest $(IN_PROCESSES) $(PYTEST_ARGS)

lint: $(READY)  ## ruff's rules and format, and the types of lance_runtime/
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## one JSON line a measurement; make bench ARGS="--real-width", ARGS="--help"
	$(BIN)/python tests/benchmarks/bench.py $(ARGS)

clean:  ## remove the environment and all that was made
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .mypy_cache .hypothesis

# torch first and alone: under the constraint, nothing that follows can ask for another one.
$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c "$$CHECK_PYTHON"
	@echo "Making $(VENV) (once; torch and its friends are a large download)"
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -c "$$EXTRAS" standalone test > $(VENV)/requirements.txt
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -r $(VENV)/requirements.txt
	@touch $@
