# All targets run in .venv, which is created on first use, except `make gpu` and `make gpu-more`: those
# use PYTHON directly, so that they work without a network. `make demo` and `make test` need Python
# 3.11+.

PYTHON ?= python3
# Options of the GPU targets: the folder of rows and logs, the time limit in seconds (default: 480 and
# 600), the folder of `make wheelhouse`, a checkout of the published code, and further options.
OUT ?= benchmarks/results
GPU_SECONDS ?=
WHEELHOUSE ?=
PUBLISHED ?=
GPU_OPTIONS ?=
GPU := $(PYTHON) -m benchmarks.gpu
GPU_FLAGS = --out "$(OUT)" $(if $(GPU_SECONDS),--seconds $(GPU_SECONDS)) \
	$(if $(WHEELHOUSE),--wheelhouse "$(WHEELHOUSE)") \
	$(if $(PUBLISHED),--published "$(PUBLISHED)") $(GPU_OPTIONS)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# One process per core. Tests of a file share a process and its fixtures.
ALL_CORES := -n auto --dist loadfile --no-loadscope-reorder

# Idle OpenMP threads sleep soon. Spinning would slow the other processes on their cores.
export GOMP_SPINCOUNT ?= 1000

.DEFAULT_GOAL := help
.PHONY: help install demo test gpu gpu-more gpu-rehearsal wheelhouse lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11: set PYTHON=/path/to/python3.11 or newer"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps depend on pyproject.toml, so a second run installs nothing.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	@touch $@

install: $(VENV)/.installed  ## make .venv and install the package

demo: $(VENV)/.installed  ## train a small MS-DETR on synthetic images, evaluate it, draw its predictions
	$(BIN)/msdetr demo --output demo

test: $(VENV)/.installed-dev  ## run the test suite, on all cores
	$(BIN)/python -m pytest $(ALL_CORES)
	$(BIN)/python -m pytest $(ALL_CORES) -q tests/parity -k "msda or one_to or losses" --impl triton

gpu:  ## on a GPU: tests, then benchmarks, in 8 minutes; JSON rows in OUT
	@$(GPU) run $(GPU_FLAGS)

gpu-more:  ## on a GPU, after `make gpu`: kernel configurations, profiles, further tests, whole runs
	@$(GPU) more $(GPU_FLAGS)

gpu-rehearsal: OUT = rehearsal
gpu-rehearsal:  ## both without a GPU, at small sizes, in a few minutes
	@failed=0; for part in run more; do $(GPU) $$part --rehearse $(GPU_FLAGS) || failed=1; done; \
	exit $$failed

wheelhouse: | $(VENV)/bin/python  ## download what a GPU machine without a network lacks
	$(PIP) packaging
	@$(BIN)/python -m benchmarks.gpu.wheelhouse $(or $(WHEELHOUSE),wheelhouse)

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## reformat the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, caches and what other targets write
	rm -rf $(VENV) demo rehearsal wheelhouse .pytest_cache .mypy_cache .ruff_cache *.egg-info
