# `make demo` and `make test` set everything up themselves (a .venv here). `make help` lists all.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# TORCH=2.11.0: the oldest supported one
TORCH := $(or $(TORCH),$(shell sed -n 's/^torch==//p' constraints.txt))
READY := $(VENV)/.ready-torch-$(TORCH)
MXNET := .venv-mxnet

.PHONY: help install demo test test-all test-mxnet lint format gpu-check gpu-bench gpu-wheels bench clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(READY): requirement.txt requirement-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.ready*
	@sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(VENV)/constraints.txt
	@# torch first and by its exact version, so that nothing else chooses another build
	$(PY) -m pip install --quiet torch==$(TORCH) -c $(VENV)/constraints.txt
	$(PY) -m pip install --quiet -r requirement.txt -r requirement-dev.txt -c $(VENV)/constraints.txt
	@touch $@

install: $(READY)  ## the environment in .venv

demo: $(READY)  ## generated images: train on 2 ranks, verify, export, plot (about 5 minutes)
	$(PY) -m scripts.demo

lint: $(READY)  ## ruff (rules and format) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check --quiet .
	$(PY) -m mypy

# MXNet 1.9.1 judges our records. It needs numpy 1.23.5, which exists for Python up to 3.11, hence an
# environment of its own; where it cannot be built its tests are skipped and say why.
$(MXNET)/.tried:
	@rm -rf $(MXNET) && mkdir $(MXNET)
	@python=$$(for p in $(PYTHON) python3.11 python3.10 python3.9 python3.8; do \
	  $$p -c 'import sys; sys.exit(not (3, 8) <= sys.version_info < (3, 12))' 2>/dev/null \
	  && echo $$p && break; done); \
	if [ -z "$$python" ]; then echo "needs a Python from 3.8 to 3.11" > $(MXNET)/.unavailable; \
	elif $$python -m venv $(MXNET) && $(MXNET)/bin/python -m pip install --quiet --retries 1 \
	  mxnet==1.9.1 numpy==1.23.5 && $(MXNET)/bin/python -c 'import mxnet'; \
	then touch $(MXNET)/.ready; \
	else echo "mxnet==1.9.1 with numpy==1.23.5 cannot be installed" > $(MXNET)/.unavailable; fi
	@touch $@

test-mxnet: $(READY)  ## real MXNet reads what we write and writes what we read
	@test -f $(MXNET)/.ready || rm -f $(MXNET)/.tried
	@$(MAKE) --no-print-directory $(MXNET)/.tried
	REQUIRE_MXNET=1 $(PY) -m pytest tests/test_mxnet.py

test: lint $(MXNET)/.tried  ## lint, types and the tests (9 to 18 minutes on 2 cores)
	@# two processes, each file whole in one of them: ranks mostly wait for each other
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n 2 --dist loadfile

test-all: lint $(MXNET)/.tried  ## also the long versions
	$(PY) -m pytest

gpu-check: $(READY)  ## the checks that need a GPU; says so where there is none
	$(PY) -m scripts.gpu_check

OUT := benchmarks/results/$(shell date +%F)_gpu_bench
MINUTES := 8
gpu-bench: $(READY)  ## everything to be measured on one GPU: [OUT=folder] [MINUTES=8]
	$(PY) -m benchmarks.gpu_bench "$(OUT)" --minutes $(MINUTES)

# What a usual image with PyTorch for CUDA lacks of requirement.txt, and what that requires itself.
GPU_LACKS := simplejpeg easydict pydantic pydantic_core annotated-types typing-inspection typing_extensions
PLATFORMS := manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64 any
PYTHON_VERSION := 3.12
gpu-wheels: $(READY)  ## what a GPU machine without network lacks: DIR=empty folder [PYTHON_VERSION=3.12]
	$(if $(DIR),,$(error gpu-wheels: say where the wheels go: make gpu-wheels DIR=folder))
	@if ls "$(DIR)"/*.whl >/dev/null 2>&1; then echo "$(DIR) has wheels already: empty it" >&2; exit 2; fi
	$(PY) -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
	  --python-version $(PYTHON_VERSION) $(PLATFORMS:%=--platform=%) --dest "$(DIR)" \
	  -c constraints.txt $(GPU_LACKS)
	@ls -sh "$(DIR)"/*.whl
	@echo 'There: python3 -m pip install --no-index --no-deps --target SITE *.whl && export PYTHONPATH=SITE'

bench: $(READY)  ## quick benchmarks
	$(PY) -m benchmarks.bench_head --quick
	$(PY) -m benchmarks.bench_data --quick
	$(PY) -m benchmarks.bench_eval --quick

format: $(READY)  ## let ruff format the code and sort the imports
	$(PY) -m ruff check --fix --select I --quiet .
	$(PY) -m ruff format .

clean:  ## remove what the demo and the tools made; runs of yours and .venv stay
	rm -rf work_dirs/demo demo_data .pytest_cache .mypy_cache .ruff_cache .hypothesis
