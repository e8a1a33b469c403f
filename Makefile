# SPDX-License-Identifier: Apache-2.0
# make demo   trains the example on the CPU and names the curve and the picture that it wrote
# make test   C++ tests (ctest), then Python tests (pytest)
# make lint   formatters, linters, type check
#
# All of them work in .venv, which they make. PYTHON chooses the interpreter, TORCH the torch to install there,
# MOM_CUDA (AUTO, ON, OFF) whether the CUDA library is built.

PYTHON ?= python3
TORCH ?= torch==2.13.0
MOM_CUDA ?= AUTO
export MOM_CUDA
JOBS ?= $(shell nproc)

VENV := .venv
BIN := $(abspath $(VENV))/bin
CPP_SOURCES = $(shell git ls-files 'csrc/*' 'benchmarks/cpp/*' 'examples/cpp/*' 'tests/cpp/*' | grep -E '\.(h|cpp|cu|cuh)$$')
BUILD_INPUTS = $(shell find csrc cmake CMakeLists.txt setup.py pyproject.toml tools/build_backend.py -type f)

.PHONY: demo test test-cpp test-python lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed $(VENV)/examples
	$(BIN)/python examples/python/chameleon.py --output runs/demo

test: test-cpp test-python

test-cpp: $(VENV)/installed
	tools/system_packages.sh --tests
	$(BIN)/cmake -S . -B build/tests -G Ninja -DMOM_BUILD_TESTS=ON -DMOM_CUDA=$(MOM_CUDA) \
	  -DMOM_PYTHON=$(BIN)/python -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja >build/tests-configure.log \
	  || { cat build/tests-configure.log; exit 1; }
	$(BIN)/cmake --build build/tests --parallel $(JOBS)
	$(BIN)/ctest --test-dir build/tests --output-on-failure --no-tests=error

test-python: $(VENV)/installed $(VENV)/examples $(VENV)/neighbours
	$(BIN)/python -m pytest

$(VENV)/bin/python:
	tools/system_packages.sh
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/torch: | $(VENV)/bin/python
	$(BIN)/pip install --quiet '$(TORCH)' numpy cmake ninja
	touch $@

$(VENV)/installed: $(VENV)/torch $(BUILD_INPUTS)
	mkdir -p build
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/examples: $(VENV)/torch examples/python/requirements.txt
	$(BIN)/pip install --quiet --requirement examples/python/requirements.txt
	touch $@

$(VENV)/neighbours: $(VENV)/torch tests/python/requirements.txt
	$(BIN)/pip install --quiet --requirement tests/python/requirements.txt
	touch $@

$(VENV)/lint: $(VENV)/torch tools/lint_requirements.txt
	$(BIN)/pip install --quiet --requirement tools/lint_requirements.txt
	touch $@

lint: $(VENV)/lint
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/lint
	$(BIN)/clang-format -i $(CPP_SOURCES)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist $(VENV) mixture_of_mamba/lib *.egg-info
