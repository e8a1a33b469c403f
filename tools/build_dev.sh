#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the op libraries in place for development: tools/build_dev.sh [cpu|cuda] [cmake options ...]
# PYTHON names the Python whose torch is built against.
set -euo pipefail
cd "$(dirname "$0")/.."
backend=${1:-cpu}
[ $# -gt 0 ] && shift
case $backend in
  cpu) cuda=OFF ;;
  cuda) cuda=ON ;;
  *) echo "usage: tools/build_dev.sh [cpu|cuda] [cmake options ...]" >&2; exit 2 ;;
esac
mkdir -p build
cmake -S . -B build/dev -G Ninja -DMOM_CUDA=$cuda -DMOM_PYTHON="${PYTHON:-python3}" "$@" >build/dev-configure.log ||
  { cat build/dev-configure.log; exit 1; }
cmake --build build/dev --parallel "${MAX_JOBS:-$(nproc)}"
cmake --install build/dev --prefix "$PWD/mixture_of_mamba" >/dev/null
echo "built $(ls mixture_of_mamba/lib/*.so | tr '\n' ' ')"
