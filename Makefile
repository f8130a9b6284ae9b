# Every target sets up what it needs in .venv, once: see .ci/setup. A set-up is good for as long as its recipe (.ci/setup
# itself, and pyproject.toml down to [tool.ruff]) stays the same. So a second `make demo` starts at once, and an
# interrupted set-up goes on where it was.
#
#   make PYTHON=python3.12 ...   builds .venv on that interpreter (default: first of python3.11, python3.12, python3)
#   make ACCEL=cpu ...           leaves a GPU alone (default: gpu where nvidia-smi works)
#   make demo ARGS="--rows 8"    hands ARGS to `arun demo`; test, test-fast, bench and soak take ARGS, too
#
# pip's own configuration applies. A CPU machine may need PyTorch's CPU index in PIP_EXTRA_INDEX_URL, so that pip finds
# torch built without CUDA.

SHELL := /bin/bash
.DEFAULT_GOAL := help
export PYTHON ACCEL

BIN := .venv/bin
STAMP := .venv/.stamp-$(shell { sed '/^\[tool\.ruff\]/,$$d' pyproject.toml; cat .ci/setup; } | cksum | cut -d ' ' -f 1)
ARGS ?=

.PHONY: help setup demo test test-fast check format docs bench soak clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP):
	@.ci/setup $@

setup: $(STAMP) ## install everything into .venv; the other targets do it by themselves

demo: $(STAMP) ## ask a real model about real rows, and watch the partial reductions
	@$(BIN)/arun demo $(ARGS)

# The fast and the long tests share the cores: two workers a core, since many wait for a process that they have started,
# and at most 16, since each collects all tests. A Ray or an engine takes the cores all for itself. Without caches of
# bytecode, each of those processes would compile arun anew.
unexport PYTHONDONTWRITEBYTECODE
WORKERS := $(shell n=$$((2 * $$(nproc))); echo $$((n < 16 ? n : 16)))
SHARED = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
ALONE = $(BIN)/python -m pytest

test: $(STAMP) ## all tests: the fast and the long ones, then those with a real Ray, then those with a real vLLM
	@$(SHARED) -m "not ray and not engine" $(ARGS); shared=$$?; \
	$(ALONE) -m "ray or engine" $(ARGS); alone=$$?; \
	[[ $$shared =~ ^[05]$$ && $$alone =~ ^[05]$$ ]] # 5: ARGS chose none of these

test-fast: $(STAMP) ## the tests to run while coding: those that start neither Ray nor vLLM, and are not long by design
	$(SHARED) -m "not ray and not engine and not long" $(ARGS)

SOURCES := $(wildcard arun actors examples tests docs)
# examples/quickstart.py is what the README shows: it goes without types, to fit on a screen.
TYPED := arun actors examples/fastapi_stream.py

check: $(STAMP) ## formatting, linters, types, docs
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/flake8 $(SOURCES)
	$(BIN)/mypy $(TYPED)
	$(BIN)/pyright --warnings --pythonpath $(BIN)/python $(TYPED)
	$(BIN)/sphinx-build -q -n -W --keep-going docs docs/_build/html

format: $(STAMP) ## write the formatting and the fixes that ruff is sure of
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

docs: $(STAMP) ## build the documentation into docs/_build/html
	$(BIN)/sphinx-build -q -n -W --keep-going docs docs/_build/html
	@echo "docs/_build/html/index.html"

# Benchmarks and soak runs are programs, not tests.
bench: $(STAMP) ## measure; prints a table, and judges nothing
	@$(BIN)/python -m tests.benchmarks $(ARGS)

soak: $(STAMP) ## random work under faults, half an hour for each program; ARGS="--seconds 60 kills"
	@$(BIN)/python -m tests.soak $(ARGS)

clean: ## remove caches and what was built; keeps .venv
	rm -rf build dist docs/_build .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find arun actors examples tests docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## remove .venv as well
	rm -rf .venv .virtualenv
