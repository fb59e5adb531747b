# `make quickstart` and `make test` do all their own set-up; `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help venv model quickstart test lint chaos bench gpu-test docs clean distclean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# requirements/install.sh writes this file last, so it exists only after a whole install.
STAMP := $(VENV)/.installed
MODEL := models/smollm2-135m-instruct
PYTEST_ARGS ?=
# A test file stays in one process, for its cluster and engines; the longest files come first.
XDIST ?= -n 2 --dist loadfile --no-loadscope-reorder
# judge_pairs.py makes what others measure on.
BENCH ?= bench/judge_pairs.py $(filter-out bench/judge_pairs.py,$(sort $(wildcard bench/[a-z]*.py)))

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

$(STAMP): requirements/cpu.txt requirements/dev.txt requirements/install.sh pyproject.toml
	@requirements/install.sh cpu "$(PYTHON)" "$(VENV)"

$(MODEL)/config.json: | $(STAMP)
	@$(BIN)/rlhf fetch-model smollm2-135m $(MODEL)

venv: $(STAMP) ## build .venv

model: $(MODEL)/config.json ## fetch the small model

quickstart: $(STAMP) $(MODEL)/config.json ## set up, then train the small model on this machine
	@$(BIN)/rlhf train configs/quickstart.yaml --fresh

test: $(STAMP) $(MODEL)/config.json lint ## set up, lint and run the test suite
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not gpu and not slow" $(XDIST) $(PYTEST_ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

chaos: $(STAMP) $(MODEL)/config.json ## the slow tests: kills and damage, recipes on simulated clusters
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

bench: $(STAMP) $(MODEL)/config.json ## run bench/*.py (BENCH=bench/one.py for one)
	@test -n "$(BENCH)" || { echo "no benchmark under bench/" >&2; exit 2; }
	@for script in $(BENCH); do echo "== $$script"; HF_HUB_OFFLINE=1 $(BIN)/python "$$script"; done

.venv-gpu/.installed: requirements/gpu.txt requirements/dev.txt requirements/install.sh pyproject.toml
	@requirements/install.sh gpu "$(PYTHON)" .venv-gpu

gpu-test: .venv-gpu/.installed $(MODEL)/config.json ## the GPU tests, in .venv-gpu (needs NVIDIA GPUs)
	HF_HUB_OFFLINE=1 .venv-gpu/bin/python -m pytest -m gpu $(PYTEST_ARGS)

docs: $(STAMP) ## write docs/configuration.md and configs/config.schema.json again
	$(BIN)/python -m rlhf.config.reference

clean: ## remove caches and build output
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find rlhf actors tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove the virtual environments and fetched models
	rm -rf .venv .venv-gpu models
