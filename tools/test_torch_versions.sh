#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One wheel, unchanged, on several torch versions: the libraries keep to torch's stable ABI, and this shows it.
# Builds the wheel against .venv's torch, then runs the doctor and the Python tests in a fresh environment per version.
#
# usage: tools/test_torch_versions.sh [torch version ...]     default: 2.13.0 2.14.1 2.15.0
#   PYTHON=python     the Python to build with and to make environments from (default .venv/bin/python)
#   WHEEL=file        test this wheel instead of building one
#   MOM_CUDA=OFF      leave the CUDA library out (default: ON where there is nvcc); TORCH_CUDA_ARCH_LIST as always
#   PYTEST_ADDOPTS    for pytest, for example "-k scan"
# A torch with CUDA takes some 5 GB of disk while it is tested.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ $# -gt 0 ] || set -- 2.13.0 2.14.1 2.15.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -z "${WHEEL:-}" ]; then
  if command -v nvcc >/dev/null; then export MOM_CUDA=${MOM_CUDA:-ON}; fi
  (cd "$root" && "$python" -m pip wheel --quiet --no-deps --wheel-dir "$work" .)
  WHEEL=$(ls "$work"/*.whl)
fi
WHEEL=$(realpath "$WHEEL")
checksum=$(sha256sum "$WHEEL")
echo "wheel: $(basename "$WHEEL"), sha256 ${checksum:0:16}"

# One line of the table; returns 1 when anything is off.
try() {
  local version=$1 env=$work/env log=$work/log start=$SECONDS status=0
  rm -rf "$env"
  "$python" -m venv "$env"
  if ! "$env/bin/pip" install --quiet "torch==$version" "$WHEEL[test]" \
    --requirement "$root/examples/python/requirements.txt" >"$log" 2>&1; then
    cat "$log" >&2
    echo "$version|-|-|-|cannot be installed"
    return 1
  fi
  cd "$work"  # in the source folder, Python would import that
  local installed
  installed=$("$env/bin/python" -c 'import torch, mixture_of_mamba as m; print(torch.__version__, m.__file__)')
  if [[ $installed != *"$env"* ]]; then
    echo "$version|-|-|-|the wheel is not what is imported: ${installed:-no import}"
    return 1
  fi
  "$env/bin/python" -m mixture_of_mamba.doctor >"$log" 2>&1 || status=1
  cat "$log" >&2
  library() { sed -n "s/^$1 library *//p" "$log" | cut -d, -f1; }
  local cpu cuda tests
  cpu=$(library CPU)
  cuda=$(library CUDA)
  # A torch with CUDA must load the CUDA library, with or without a GPU.
  grep -q "^torch .*CUDA [0-9]" "$log" && [ "$cuda" = "does not load" ] && status=1
  "$env/bin/pytest" -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -q "$root/tests/python" >"$log" 2>&1 ||
    { status=1; cat "$log" >&2; }
  tests=$(tail -n 1 "$log" | sed 's/ in [0-9.]*s.*//; s/^=* *//')
  echo "${installed%% *}|$cpu|$cuda|$((SECONDS - start)) s|$tests"
  return $status
}

failed=0
lines=("torch|CPU library|CUDA library|time|tests")
for version in "$@"; do
  line=$(try "$version") || failed=1
  lines+=("$line")
  echo "$line"
done
rm -rf "$work/env"
echo
printf '%s\n' "${lines[@]}" | awk -F'|' '{ printf "%-14s %-12s %-22s %-7s %s\n", $1, $2, $3, $4, $5 }'
exit $failed
