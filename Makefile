# Every target sets up what it needs in .venv; nothing is kept outside the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch
# nvcc from pip, so that no system CUDA is needed to compile the CUDA kernels.
NVCC := "cuda-toolkit[nvcc,cccl]==13.0.*"

.PHONY: demo test test-slow bench lint wheel clean

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

# Of the CUDA kernels only what CI needs is compiled here; `make wheel` compiles all. Editable: tests and benchmarks run
# on the sources; the compiled part is built in place.
SOURCES := $(shell git ls-files csrc CMakeLists.txt setup.py 2>/dev/null)
$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-8.0+PTX}" RFKERNELS_HEAD_DIMS="$${RFKERNELS_HEAD_DIMS:-64 128}" \
		$(BIN)/pip install -q --no-build-isolation -e ".[test,demo,bench]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info rfkernels/*.so
