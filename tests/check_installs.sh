#!/usr/bin/env bash
# Installs the package in fresh environments and uses it from another folder:
#   tests/check_installs.sh cpu       CPU-only torch 2.13, no nvcc: compiled CPU kernels
#   tests/check_installs.sh python    torch 2.9: Python-only, saying so
#   tests/check_installs.sh versions  a wheel with CUDA kernels, built beside the torch of $PYTHON (default: .venv's),
#                                     used with CPU-only torch 2.13; and one built with that, without nvcc, the other way.
#                                     WHEEL=... is used instead of building the first
# Needs a package index (minutes; "python" downloads several GB where 2.9 has no small build). TORCH=... picks another.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mode=${1:-cpu} newer=${PYTHON:-$root/.venv/bin/python} torch=${TORCH:-torch==2.13.0} expected="compiled CPU loops"
case "$mode" in
  cpu) newer=python3 ;;
  python) newer=python3 torch=${TORCH:-torch==2.9.1} expected="no compiled CPU loops" ;;
  versions) ;;
  *) echo "usage: $0 cpu|python|versions" >&2; exit 2 ;;
esac

without_nvcc() { env -u CUDA_HOME PATH="$work/torch/bin:/usr/bin:/bin" "$@"; }

# use ENVIRONMENT WHAT_THE_CPU_LOOPS_ARE [cuda]
use() {
  local empty; empty=$(mktemp -d -p "$work")
  cp "$root/tests/installed.py" "$empty" && cd "$empty"
  "$1/bin/python" -m rfkernels info
  "$1/bin/python" installed.py "${@:2}"
}

git -C "$root" archive HEAD | tar -x -C "$work" --one-top-level=source
"$newer" -m venv "$work/torch"
"$work/torch/bin/pip" install -q "$torch" numpy
if [ "$mode" != versions ]; then
  without_nvcc pip install -q "$work/source"
  use "$work/torch" "$expected"
  exit
fi

# Built beside the newer torch, with nvcc; used with the older one.
if [ -z "${WHEEL:-}" ]; then
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-8.0+PTX} RFKERNELS_HEAD_DIMS=${RFKERNELS_HEAD_DIMS:-64} \
    "$newer" -m pip wheel -q --no-build-isolation --no-deps -w "$work/cuda" "$work/source"
  WHEEL=$(echo "$work"/cuda/*.whl)
fi
"$work/torch/bin/pip" install -q "$WHEEL"
use "$work/torch" "$expected" cuda

# Built with the older torch, without nvcc; used beside the newer one, whose packages a fresh environment borrows.
without_nvcc pip wheel -q --no-deps -w "$work/cpu" "$work/source"
"$newer" -m venv --without-pip "$work/newer"
"$newer" -c 'import sysconfig; print(sysconfig.get_path("platlib"))' > "$(echo "$work"/newer/lib/python*/site-packages)/shared.pth"
"$newer" -m pip --python "$work/newer/bin/python" install -q --no-deps --no-index "$work"/cpu/*.whl
use "$work/newer" "$expected"
