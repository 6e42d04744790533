#!/usr/bin/env bash
# What some tests need beyond Python packages: a browser (the plan page), network namespaces with
# shaped links (the testbed), Ray (a planning pool), Megatron-Core and torchtitan (without their own
# torch and CUDA packages). Without them those tests are skipped by name.
set -euo pipefail
cd "$(dirname "$0")/.."
missing=()
command -v chromium >/dev/null || command -v google-chrome >/dev/null || missing+=(chromium)
command -v tc >/dev/null || missing+=(iproute2)
if [ ${#missing[@]} -gt 0 ]; then
  sudo=$([ "$(id -u)" = 0 ] || echo sudo)
  $sudo apt-get update -qq
  $sudo apt-get install -y -qq "${missing[@]}"
fi
make .venv/.dev
export PIP_CONSTRAINT=constraints.txt
.venv/bin/pip --disable-pip-version-check install --quiet "ray>=2.40"
.venv/bin/pip --disable-pip-version-check install --quiet --no-deps "megatron-core>=0.16"
# torchtitan: with --no-deps what would change torch or the Hub's client, then what these import
.venv/bin/pip --disable-pip-version-check install --quiet --no-deps torchtitan torchdata datasets
.venv/bin/pip --disable-pip-version-check install --quiet --editable ".[torchtitan]"
