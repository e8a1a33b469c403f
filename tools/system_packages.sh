#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Names the system packages that are missing, and installs them where apt and root allow.
# usage: tools/system_packages.sh [--tests]     --tests: also what the C++ tests need
set -euo pipefail

missing=()
have_header() { echo "#include <$1>" | c++ -std=c++20 -E -x c++ - >/dev/null 2>&1; }

if ! echo '#include <concepts>' | c++ -std=c++20 -fsyntax-only -x c++ - >/dev/null 2>&1; then
  missing+=(g++)
fi
command -v make >/dev/null || missing+=(make)
"${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
if [ "${1:-}" = --tests ] && ! have_header catch2/catch_all.hpp && ! have_header catch2/catch.hpp; then
  missing+=(catch2)
fi
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
  echo "installing ${missing[*]}"
  apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
else
  echo "missing system packages: ${missing[*]}" >&2
  echo "install them with: sudo apt-get install ${missing[*]}" >&2
  exit 1
fi
