# Two commands do all the set-up: `make demo` and `make test`. Each makes its own environment in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test test-peer test-gpu lint bench tiny-int4 clean

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/huoyan: pyproject.toml constraints.txt
	@echo "making an environment in $(VENV) (torch and a few libraries; some minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit("huoyan needs Python 3.10 or later") if sys.version_info < (3, 10) else None'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q -c constraints.txt torch
	@$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(BIN)/huoyan
	@echo "adding what the tests need"
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@ $(BIN)/huoyan

demo: $(BIN)/huoyan  ## ask the embedded model about a picture and a video
	@$(BIN)/python examples/demo.py

test: $(VENV)/.dev  ## the tests that need no GPU and no peer
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not peer"

test-peer: $(VENV)/.dev  ## engine, vLLM backend and plugin against vLLM on the CPU, in an environment of its own (.venv-peer)
	@$(PYTHON) tests/peer/install.py .venv-peer
	@HUOYAN_PEER_PYTHON=.venv-peer/bin/python $(BIN)/python -m pytest -q -m peer tests/peer tests/vllm_plugin
	@.venv-peer/bin/python -m pytest -q -p no:cacheprovider -m peer tests/contract

test-gpu:  ## the GPU tests, with the python that has torch with CUDA (PYTHON=...)
	@PYTHONPATH=src $(PYTHON) -m pytest -q tests/kernels tests/engine/test_gpu.py tests/plan/test_gpu.py -p no:cacheprovider

lint: $(VENV)/.dev  ## style and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: $(BIN)/huoyan  ## what the benchmarks are and how to run them
	@cat benchmarks/README.md

tiny-int4: $(BIN)/huoyan  ## quantize the embedded model again
	@$(BIN)/python training/make_tiny_int4.py

clean:  ## remove the environments and caches
	rm -rf $(VENV) .venv-peer .pytest_cache .mypy_cache .ruff_cache .hypothesis
