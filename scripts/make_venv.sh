#!/usr/bin/env bash
# Make a virtual environment (.venv, or FOLDER) and install the project into it.
#
#   make_venv.sh WHAT [FOLDER]
#
# WHAT: extras of this checkout, such as train,dev, or a wheel file.
# A machine without an NVIDIA GPU gets a torch without CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
what=$1
venv=${2:-.venv}
python=${PYTHON:-python3}

fail() { echo "$1" >&2; exit 2; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "dcp needs Python 3.11 or newer; '$python' is not. Name another: make PYTHON=python3.12 …"
if [ ! -x "$venv/bin/pip" ]; then
  rm -rf "$venv"
  "$python" -m venv "$venv" ||
    { rm -rf "$venv"; fail "'$python -m venv' failed; on Debian: apt-get install python3-venv"; }
fi
pip=("$venv/bin/pip" --disable-pip-version-check)

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# PyTorch's default Linux build brings gigabytes of CUDA packages. Where pip would choose that one
# and there is no GPU to use it, take PyTorch's own CPU build of the same version instead.
if ! has_gpu && ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  if "${pip[@]}" install --quiet --dry-run --report - torch | grep -qE '"name": "(nvidia|cuda)-'; then
    "${pip[@]}" install --index-url https://download.pytorch.org/whl/cpu torch
  else
    "${pip[@]}" install torch
  fi
fi

if [[ $what == *.whl ]]; then
  "${pip[@]}" install "$what"
else
  "${pip[@]}" install --editable ".[$what]"
fi
