#!/usr/bin/env bash
# Installs the package in fresh environments and uses it from another folder:
#   tests/check_installs.sh cpu        CPU-only torch, no nvcc: `pip install .`, compiled CPU kernels
#   tests/check_installs.sh isolation  the same with --no-build-isolation: as the environment is, then with the tools it names
#   tests/check_installs.sh python     torch 2.9: Python-only, saying so
#   tests/check_installs.sh cuda       torch with CUDA and the nvcc that is found: `pip install .`, CUDA kernels
#   tests/check_installs.sh versions   two wheels, each built once and used in all of TORCHES: one with CUDA kernels, built
#                                      beside the torch of $PYTHON (default: .venv's), and one built beside the first
#                                      of TORCHES without nvcc
#   tests/check_installs.sh pythons    one wheel, built as for "versions", in each of PYTHONS with the newest torch
# TORCH=... picks another torch; WHEEL=... is used by "versions" and "pythons" instead of building one, and EXTRAS=... is
# installed beside it. Needs a package index: minutes, and several GB where torch has no small build. "versions" and
# "pythons" remove each environment before they make the next.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mode=${1:-cpu} python=python3 newer=${PYTHON:-$root/.venv/bin/python} torch=${TORCH:-torch==2.13.0}
expected="compiled CPU loops"
case "$mode" in
  cpu | isolation | versions) ;;
  python) torch=${TORCH:-torch==2.9.1} expected="no compiled CPU loops" ;;
  cuda | pythons) torch=${TORCH:-torch} ;;
  *) echo "usage: $0 cpu|isolation|python|cuda|versions|pythons" >&2; exit 2 ;;
esac
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST-8.0+PTX} RFKERNELS_HEAD_DIMS=${RFKERNELS_HEAD_DIMS-64}

without_nvcc() { env -u CUDA_HOME -u TORCH_CUDA_ARCH_LIST PATH="$work/torch/bin:/usr/bin:/bin" "$@"; }

# environment FOLDER PYTHON TORCH
environment() {
  "$2" -m venv "$1"
  "$1/bin/pip" install -q "$3" numpy
}

# use ENVIRONMENT WHAT_THE_CPU_LOOPS_ARE [cuda]
use() {
  local empty; empty=$(mktemp -d -p "$work")
  cp "$root/tests/installed.py" "$empty"
  (cd "$empty" && "$1/bin/python" -m rfkernels info && "$1/bin/python" installed.py "${@:2}")
}

build_wheel() {  # beside the torch of $newer, with nvcc
  [ -n "${WHEEL:-}" ] && return
  "$newer" -m pip wheel -q --no-build-isolation --no-deps -w "$work/cuda" "$work/source"
  WHEEL=$(echo "$work"/cuda/*.whl)
}

git -C "$root" archive HEAD | tar -x -C "$work" --one-top-level=source

case "$mode" in
  cpu | python)
    environment "$work/torch" "$python" "$torch"
    without_nvcc pip install -q "$work/source"
    use "$work/torch" "$expected"
    ;;
  isolation)
    environment "$work/torch" "$python" "$torch"
    if without_nvcc pip install -q --no-build-isolation "$work/source" 2> "$work/said"; then
      echo "the environment as it is: installed"
      use "$work/torch" "compiled CPU loops" || use "$work/torch" "no compiled CPU loops"
    else
      grep "rfkernels: setuptools .* is too old" "$work/said" || { cat "$work/said" >&2; exit 1; }
    fi
    "$work/torch/bin/pip" install -q -U "setuptools>=77" cmake ninja
    without_nvcc pip install -q --force-reinstall --no-deps --no-build-isolation "$work/source"
    use "$work/torch" "$expected"
    ;;
  cuda)
    environment "$work/torch" "$python" "$torch"
    "$work/torch/bin/pip" install -q "$work/source"
    use "$work/torch" "$expected" cuda
    ;;
  versions)
    build_wheel
    for torch in ${TORCHES:-torch==2.10.0 torch==2.11.0 torch==2.13.0 torch}; do
      environment "$work/torch" "$newer" "$torch"
      [ -d "$work/cpu" ] || without_nvcc pip wheel -q --no-deps -w "$work/cpu" "$work/source"
      "$work/torch/bin/pip" install -q "$work"/cpu/*.whl ${EXTRAS:-}
      use "$work/torch" "$expected"
      "$work/torch/bin/pip" install -q --force-reinstall --no-deps "$WHEEL"
      use "$work/torch" "$expected" cuda
      rm -rf "$work/torch"
    done
    ;;
  pythons)
    build_wheel
    for python in ${PYTHONS:-python3.10 python3.11 python3.12 python3.13 python3.14}; do
      if ! "$python" -c "" 2> /dev/null; then echo "$python: not here"; continue; fi
      environment "$work/$(basename "$python")" "$python" "$torch"
      "$work/$(basename "$python")/bin/pip" install -q "$WHEEL" ${EXTRAS:-}
      use "$work/$(basename "$python")" "$expected" cuda
      rm -rf "${work:?}/$(basename "$python")"
    done
    ;;
esac
