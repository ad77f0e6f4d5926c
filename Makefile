# Needs only Python >= 3.11 (with pip and venv) and make. Everything installed goes into .venv.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
# The newest Python that runs: the newest releases of JAX need a newer one than 3.11. A command that
# is found may still fail, as pyenv's do for a version that is installed but not selected.
PYTHON_NEWEST ?= $(shell for v in 3.13 3.12 3.11 3; do \
  for p in python$$v $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$v.*/bin/python; do \
  $$p -c '' >/dev/null 2>&1 && echo $$p && exit; done; done)
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
ARGS ?=

NEWEST_EXTRAS := experiments,notebooks,test
TEST_EXTRAS := $(NEWEST_EXTRAS),lint
# Its dependencies are for its trainers; the models, which the tests use, need none of them.
TUNIX := google-tunix==0.1.7
# The oldest release whose adapters are read and written; constraints-peft.txt has the newest.
OLD_PEFT := peft==0.17.1
# Exact versions, for what is installed and for the build backend of the editable install alike
# (newer releases of pip read the latter from a variable of its own). The path must be relative:
# pip splits the value at spaces. Not exported: the experiments call pip too, for their data.
PIN = PIP_CONSTRAINT=$(PINS) PIP_BUILD_CONSTRAINT=$(PINS)
PINS := constraints.txt
INSTALL := -m pip install -q --disable-pip-version-check
TESTS := -m pytest -q -n $(JOBS) --dist worksteal --nbmake

.PHONY: help quickstart gpu test test-full test-models test-peft test-newest lint format constraints clean

help:  ## List the targets (default)
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

quickstart: $(VENV)/.quickstart  ## Fine-tune a small model with DoRA; options in ARGS="..."
	@$(BIN)/python -m experiments.quickstart $(ARGS)

# In an image for CUDA that has jax, flax, optax, orbax-checkpoint, chex, torch, transformers and peft.
gpu:  ## Measure DoRA on the GPU of this machine, in PYTHON's own packages; options in ARGS="..."
	$(PYTHON) -m experiments.gpu $(ARGS)

test: lint  ## Lint, types, tests and docstring examples
	$(BIN)/python $(TESTS)

test-full: lint  ## The same with the wide tables of tests, and the notebooks
	JAX_DEFAULT_PRNG_IMPL=threefry2x32 JAX_DISABLE_MOST_OPTIMIZATIONS=false $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --nbmake --nbmake-timeout 900 -m '' --hypothesis-profile many

test-models: $(VENV)-models/.test  ## Tests on models of other libraries, in an environment of their own
	JAX_DISABLE_MOST_OPTIMIZATIONS=false $(VENV)-models/bin/python -m pytest -q -n $(JOBS) --dist loadgroup tests/foreign

test-peft: $(VENV)-peft/.test  ## Tests against torch and PEFT (two releases), in an environment of their own
	$(VENV)-peft/bin/python -m pytest -q -n $(JOBS) tests/parity
	PYTHONPATH=$(VENV)-peft/old $(VENV)-peft/bin/python -m pytest -q -n $(JOBS) tests/parity

test-newest: $(VENV)-newest/.python  ## Tests with the newest releases, on the newest Python found
	@echo "Installing the newest releases into $(VENV)-newest"
	@$(VENV)-newest/bin/python $(INSTALL) --upgrade --upgrade-strategy eager -e '.[$(NEWEST_EXTRAS)]'
	$(VENV)-newest/bin/python $(TESTS)

lint: $(VENV)/.test  ## Lint, formatting and types only
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.test  ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

constraints:  ## Write constraints*.txt anew from the newest releases (Python 3.11)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "The pins must hold on the oldest supported Python: make $@ PYTHON=python3.11" >&2; exit 1; }
	$(call write_pins,constraints.txt,$(TEST_EXTRAS))
	$(call write_pins,constraints-models.txt,models$(COMMA)test)
	$(call write_pins,constraints-peft.txt,parity$(COMMA)test)

clean:  ## Remove the environment, caches and build outputs
	rm -rf $(VENV) $(VENV)-models $(VENV)-peft $(VENV)-newest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

COMMA := ,
# The newest releases of some extras, into a constraints file; its comment stays.
define write_pins
@rm -rf build/pins && $(PYTHON) -m venv build/pins
@echo "Installing the newest releases into build/pins"
@build/pins/bin/python $(INSTALL) -e '.[$(2)]' hatchling editables
@{ grep '^#' $(1); build/pins/bin/python -m pip list --format=freeze \
  --exclude-editable --exclude pip --exclude setuptools; } > build/pins/constraints.txt
@mv build/pins/constraints.txt $(1) && rm -rf build/pins
endef

# The stamps are newer than what they were installed from, so a second run installs nothing.
%/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "dora_jax needs Python 3.11 or newer; '$(PYTHON)' is" \
	    "$$($(PYTHON) --version 2>/dev/null || echo not to be found)." \
	    "Name another one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@echo "Creating $(@D)"
	@$(PYTHON) -m venv $(@D)
	@touch $@

$(VENV)-newest/.python: PYTHON = $(PYTHON_NEWEST)

$(VENV)/.quickstart: pyproject.toml constraints.txt | $(VENV)/.python
	@echo "Installing the experiments' packages into $(VENV)"
	@$(PIN) $(BIN)/python $(INSTALL) -e '.[experiments]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/.python
	@echo "Installing the packages for experiments, notebooks, tests and lint into $(VENV)"
	@$(PIN) $(BIN)/python $(INSTALL) -e '.[$(TEST_EXTRAS)]'
	@touch $@ $(VENV)/.quickstart

$(VENV)-models/.test: PINS := constraints-models.txt
$(VENV)-models/.test: pyproject.toml constraints-models.txt Makefile | $(VENV)-models/.python
	@echo "Installing model libraries and the packages for tests into $(@D)"
	@$(PIN) $(@D)/bin/python $(INSTALL) -e '.[models,test]'
	@$(@D)/bin/python $(INSTALL) --no-deps $(TUNIX)
	@touch $@

$(VENV)-peft/.test: PINS := constraints-peft.txt
$(VENV)-peft/.test: pyproject.toml constraints-peft.txt Makefile | $(VENV)-peft/.python
	@echo "Installing torch, PEFT and the packages for tests into $(@D)"
	@$(PIN) $(@D)/bin/python $(INSTALL) -e '.[parity,test]'
	@$(@D)/bin/python $(INSTALL) --no-deps --upgrade --target $(@D)/old $(OLD_PEFT)
	@touch $@
