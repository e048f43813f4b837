# All targets run in .venv, which is created on first use, except `make gpu` and its parts: those use
# PYTHON directly, so that they work without a network. `make demo` and `make test` need Python 3.11+.

PYTHON ?= python3
# Options of `make gpu`: the folder of its rows, the time limit of each of its parts in seconds, the
# folder of the published code (which is then measured too), and how tests share the GPU.
OUT ?= benchmarks/results
GPU_SECONDS ?= 570
PUBLISHED ?=
GPU_PROCESSES ?= -n 8
TIMED_TESTS := $(addprefix tests/benchmarks/,test_attention.py test_assignment.py test_tune.py)
GPU_SIZE := --device cuda --height 800 --width 1333
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# One process per core. Tests of a file share a process and its fixtures.
ALL_CORES := -n auto --dist loadfile --no-loadscope-reorder

# Idle OpenMP threads sleep soon. Spinning would slow the other processes on their cores.
export GOMP_SPINCOUNT ?= 1000

.DEFAULT_GOAL := help
.PHONY: help install demo test gpu gpu-tests gpu-benchmarks lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

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

# Steps run in order of value. A step that fails or exceeds its time limit is listed at the end, and
# the others still run while there is time. Tests are reported as they finish, and benchmarks write
# each row at once, so that a timeout loses nothing.
define GPU_STEPS
begin=$$(date +%s); failed=""; \
left() { echo $$(($(GPU_SECONDS) + begin - $$(date +%s))); }; \
step() { \
	name=$$1; limit=$$2; shift 2; \
	if [ "$$limit" -gt "$$(left)" ]; then limit=$$(left); fi; \
	if [ "$$limit" -lt 30 ]; then echo "== no time left for $$name"; return; fi; \
	echo "== $$name"; timeout "$$limit" $(PYTHON) -m "$$@" || failed="$$failed $$name"; \
}
endef

gpu:  ## on a GPU: gpu-tests, then gpu-benchmarks, each in GPU_SECONDS
	@failed=0; for part in gpu-tests gpu-benchmarks; do $(MAKE) --no-print-directory $$part || failed=1; done; \
	exit $$failed

# Kernels compile on the host, so several processes share the GPU; measurements run alone on it.
gpu-tests:  ## on a GPU: tests of the kernels, and tests that need a GPU
	@$(GPU_STEPS); \
	tests() { name=$$1; limit=$$2; shift 2; step "$$name" "$$limit" pytest -v --durations 5 "$$@"; }; \
	tests kernels 200 $(GPU_PROCESSES) tests/ops/test_ms_deform_attn_kernel.py \
		tests/ops/test_ms_deform_attn_library.py tests/ops/test_assignment_kernels.py \
		tests/ops/test_focal_loss.py; \
	tests parity 60 $(GPU_PROCESSES) tests/parity -k "msda or one_to or losses" --impl triton; \
	tests steps 240 $(GPU_PROCESSES) -m gpu --continue-on-collection-errors --ignore tests/ops \
		$(addprefix --ignore ,$(TIMED_TESTS)); \
	tests timers 90 -m gpu $(TIMED_TESTS); \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

gpu-benchmarks:  ## on a GPU: benchmarks of the whole detector and its parts; JSON rows in OUT
	@mkdir -p "$(OUT)"; $(GPU_STEPS); \
	train_step() { \
		name=$$1; limit=$$2; shift 2; \
		step "$$name" "$$limit" benchmarks.detector train $(GPU_SIZE) --steps 20 --warmup 3 \
			--time-budget $$((limit - 40)) --output "$(OUT)/$${name}_cuda.json" "$$@"; \
	}; \
	step ms_deform_attn 110 benchmarks.attention \
		--time-budget 80 --output "$(OUT)/ms_deform_attn.json"; \
	train_step train_step 200 --batches 2 8 --dtypes bfloat16 \
		--implementations eager compiled-graphs compiled; \
	step inference 90 benchmarks.detector inference $(GPU_SIZE) --passes 50 --warmup 5 --batches 1 8 \
		--dtypes bfloat16 --implementations eager compiled-graphs \
		--time-budget 50 --output "$(OUT)/inference_cuda.json"; \
	train_step one_to_many 90 --presets ms-detr-pp-r50-300 deformable-detr-pp-r50-300 \
		--dtypes bfloat16 --implementations compiled-graphs; \
	if [ -n "$(PUBLISHED)" ]; then \
		train_step published 120 --published "$(PUBLISHED)" --dtypes float32 bfloat16 \
			--implementations published compiled-graphs; \
	fi; \
	step assignment 60 benchmarks.assignment --device cuda \
		--time-budget 30 --output "$(OUT)/assignment_cuda.json"; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## reformat the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, caches and the output of the demo
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache *.egg-info
