# Every target sets up what it needs in .venv; nothing is kept outside the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch
# nvcc from pip, so that no system CUDA is needed to compile the CUDA kernels.
NVCC := "cuda-toolkit[nvcc,cccl]==13.0.*"

# Of the GPU that is here: its architecture, all head sizes. Else only what CI needs; `make wheel` compiles all.
GPU := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | sed 's/^9\.0$$/9.0a/')
$(VENV)/.installed: export TORCH_CUDA_ARCH_LIST ?= $(or $(GPU),8.0+PTX)
$(VENV)/.installed: export RFKERNELS_HEAD_DIMS ?= $(if $(GPU),64 80 96 128 256,64 128)

.PHONY: demo test test-slow bench gpu-check gpu-library lint wheel clean

demo: $(VENV)/.installed
	$(BIN)/python -m rfkernels demo --out demo_output

# A process for each core, each of which takes the tests of another when its own are done.
PARALLEL := -n auto --dist worksteal

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow"

bench: $(VENV)/.installed
	$(BIN)/python -m rfkernels bench

# What a GPU is asked first; it uses the running environment, for there need be no network to make another.
MINUTES ?= 8
OUT ?= gpu_check
gpu-check:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu_check --minutes $(MINUTES) --out $(OUT)

# The kernel library for another machine, in place (rfkernels/rfkernels_kernels.so): of any Python, for torch >= 2.10.
ARCH ?= 9.0a
gpu-library: $(VENV)/.tools
	TORCH_CUDA_ARCH_LIST="$(ARCH)" RFKERNELS_HEAD_DIMS="64 80 96 128 256" $(BIN)/python setup.py -q build_ext --inplace
	ls -l rfkernels/*.so

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.h' '*.cpp' '*.cu')

# -v: what is compiled and what is left out is said while it happens. Modules of earlier builds must not get in.
wheel: $(VENV)/.tools
	rm -rf build/lib* build/bdist*
	$(BIN)/pip wheel -v --no-build-isolation --no-deps -w dist .

$(VENV)/.tools: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q $(TORCH) numpy setuptools wheel cmake ninja pybind11 ruff clang-format mypy
	$(BIN)/pip install -q $(NVCC) || echo "no nvcc from pip: CUDA kernels are left out"
	touch $@

# Editable: tests and benchmarks run on the sources; the compiled part is built in place.
SOURCES := $(shell git ls-files csrc CMakeLists.txt setup.py 2>/dev/null)
$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e ".[test,demo,bench]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info rfkernels/*.so
