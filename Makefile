# `make demo` and `make test` set everything up themselves (a .venv here). `make help` lists all.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: help install demo test test-all lint gpu-check bench clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(READY): requirement.txt requirement-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@# torch first and by its exact version, so that nothing else chooses another build
	$(PY) -m pip install --quiet $$(grep '^torch==' constraints.txt) -c constraints.txt
	$(PY) -m pip install --quiet -r requirement.txt -r requirement-dev.txt -c constraints.txt
	@touch $@

install: $(READY)  ## the environment in .venv

demo: $(READY)  ## generated faces: train on 2 ranks, verify, export, plot (about 5 minutes)
	$(PY) -m scripts.demo

lint: $(READY)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m mypy

test: lint  ## lint, types and the tests (about 3 minutes on 2 cores)
	$(PY) -m pytest -m "not slow"

test-all: lint  ## also the long versions
	$(PY) -m pytest

gpu-check: $(READY)  ## the checks that need a GPU; says so where there is none
	$(PY) -m scripts.gpu_check

bench: $(READY)  ## quick benchmarks
	$(PY) -m benchmarks.bench_head --quick
	$(PY) -m benchmarks.bench_eval --quick

clean:  ## remove what the demo and the tools made; runs of yours and .venv stay
	rm -rf work_dirs/demo demo_data .pytest_cache .mypy_cache .ruff_cache .hypothesis
