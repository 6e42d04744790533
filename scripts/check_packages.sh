#!/usr/bin/env bash
# Build wheel and sdist into FOLDER, check them, and use the wheel as a stranger would: installed
# without extras in a fresh environment, outside the checkout; then with the README's extras.
# `make versions` goes on with every Python and torch that can be had here (check_versions.py).
#
#   scripts/check_packages.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
dist=$(realpath -m "${1:-dist}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/tools"
"$work/tools/bin/pip" --disable-pip-version-check install --quiet build twine
rm -rf "$dist"
"$work/tools/bin/python" -m build --outdir "$dist" .
"$work/tools/bin/twine" check --strict "$dist"/*
wheel=$(ls "$dist"/*.whl)
if "$work/tools/bin/python" -m zipfile -l "$wheel" | grep -E '^(lab|tests|benchmarks)/'; then
  echo "the wheel holds more than the library" >&2
  exit 1
fi

export PIP_CONSTRAINT=$root/constraints.txt
bash scripts/make_venv.sh "$wheel" "$work/venv"
cd "$work"
python=$work/venv/bin/python
"$python" -c "import dcp; assert dcp.__file__.startswith('$work'), dcp.__file__"
venv/bin/dcp --version
venv/bin/dcp doctor
venv/bin/dcp plan --seqlens 4096,1000,17 --nodes 2 --devices-per-node 2 --heads 4 --report plan.html
"$python" "$root/scripts/run_readme.py" "$root/README.md" --without transformers
venv/bin/pip --disable-pip-version-check install --quiet "${wheel}[train]"
"$python" "$root/scripts/run_readme.py" "$root/README.md"
