# Everything runs in .venv, made on first use, except for `make gpu`: that takes PYTHON as it is, so
# that it works without a network. `make demo` and `make test` need Python 3.11+ and make.

PYTHON ?= python3
# Where `make gpu` stores its rows, and how many seconds it may take.
OUT ?= benchmarks/results
GPU_SECONDS ?= 570
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Waiting OpenMP threads soon sleep: spinning, they slow the processes that share their cores.
export GOMP_SPINCOUNT ?= 1000

.DEFAULT_GOAL := help
.PHONY: help install demo test gpu lint format clean

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
	$(BIN)/python -m pytest -q tests/parity -k "msda or one_to or losses" --impl triton

# A step that fails or takes too long is named at the end; the others run all the same.
gpu:  ## GPU tests, generated code, then benchmarks against the peers; JSON rows in OUT
	@mkdir -p "$(OUT)"; begin=$$(date +%s); failed=""; \
	left() { echo $$(($(GPU_SECONDS) + begin - $$(date +%s))); }; \
	step() { \
		name=$$1; limit=$$2; shift 2; echo "== $$name"; \
		timeout "$$limit" $(PYTHON) -m "$$@" || failed="$$failed $$name"; \
	}; \
	step tests 180 pytest -m gpu; \
	step codegen 150 benchmarks.codegen --check; \
	step reductions 70 benchmarks.bench_reductions --time-budget 40 \
		--output "$(OUT)/reductions.json"; \
	step ms_deform_attn "$$(left)" benchmarks.bench_ms_deform_attn \
		--time-budget "$$(($$(left) - 80))" --output "$(OUT)/ms_deform_attn.json"; \
	if [ "$$(left)" -ge 60 ]; then \
		step train_step "$$(left)" benchmarks.bench_train_step --device cuda --height 800 \
			--width 1333 --steps 10 --warmup 3 --output "$(OUT)/train_step_cuda.json"; \
	else echo "== no time left for train_step"; fi; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## reformat the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, caches and what the demo wrote
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache *.egg-info
