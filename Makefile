PYTHON ?= python3
CONFIG ?= configs/digits.yaml
RUN ?= runs/$(basename $(notdir $(CONFIG)))$(if $(FAST),-fast)
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu chaos mutants bench check docs docs-test wheel format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed  ## the whole pipeline on scikit-learn's digits, or CONFIG=...; FAST=1: from the models in models/digits
ifdef FAST
	@test -e $(RUN)/manifest.json || { mkdir -p $(RUN) && cp -r models/digits/. $(RUN); }
	$(BIN)/python -m jobs.pipeline --out $(RUN) compute.executor=local
else
	$(BIN)/python -m jobs.pipeline --config $(CONFIG) --out $(RUN)
endif

# One thread for each process: there are two of them, and Ray's. In the order of the folders: the last files are short ones.
test: $(VENV)/.installed  ## the tests, two files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed  ## tests that take minutes
	$(BIN)/python -m pytest -m 'slow and not gpu'

test-gpu: $(VENV)/.installed  ## tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

chaos: $(VENV)/.installed  ## a run with 30 and more faults, compared with an undisturbed one
	$(BIN)/python -m pytest -m chaos -s

mutants: $(VENV)/.installed  ## small faults that tests must find; FILES="core/machine/noise.py ..." chooses, ALL=1: not only a sample
	$(BIN)/python -m tests.mutants $(FILES) $(if $(ALL),--sample 0) $(MUTANTS)

bench: $(VENV)/.installed  ## speed beside its floor and beside what people run now; PARTS=engine,labels chooses
	$(BIN)/python -m bench $(if $(PARTS),--parts $(PARTS)) $(BENCH)

docs: $(VENV)/.installed  ## the documentation as a site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-test: $(VENV)/.installed  ## every command and example of the documentation
	$(BIN)/python -m pytest -m docs

wheel: $(VENV)/.installed  ## a wheel into dist/; `make test-slow` checks one
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

check: $(VENV)/.installed  ## ruff, mypy strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment, caches and runs
	rm -rf $(VENV) runs build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
