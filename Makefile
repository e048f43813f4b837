# Everything runs in .venv, made on first use. `make demo` and `make test` need Python 3.11+ and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Waiting OpenMP threads soon sleep: spinning, they slow the processes that share their cores.
export GOMP_SPINCOUNT ?= 1000

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11: set PYTHON=/path/to/python3.11 or newer"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps are renewed when pyproject.toml changes, so a second run installs nothing.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	@touch $@

install: $(VENV)/.installed  ## make .venv and install the package

demo: $(VENV)/.installed  ## train a small MS-DETR on synthetic images, evaluate it, draw its predictions
	$(BIN)/msdetr demo --output demo

test: $(VENV)/.installed-dev  ## run the test suite
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest -q tests/parity -k msda --impl triton

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## reformat the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, caches and what the demo wrote
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache *.egg-info
