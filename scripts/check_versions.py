"""Try a wheel with every Python and torch it is for, and every extra; name what cannot be tried.

    python scripts/check_versions.py WHEEL [--python 3.11,3.12] [--torch 2.11,2.13]

For each pair of a Python on this machine and a torch: where there is a build without CUDA, both are
installed into a fresh environment and used; where the only build brings gigabytes of CUDA packages,
pip resolves them and nothing is installed. The table at the end says which. The exit status is 0 if
nothing failed and at least one pair was used.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
TORCHES = ("2.11", "2.13")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MOST_PACKAGES = 9  # of a base install besides torch's
USE = """
import dcp, torch
spec = dcp.AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32")
batch, cluster = dcp.SequenceBatch([200, 70, 1]), dcp.Cluster(devices_per_node=3)
plan = dcp.plan(batch, spec, cluster, block_size=64)
q, k, v = (torch.randn(271, heads, 16, requires_grad=True) for heads in (4, 2, 2))
dcp.LocalWorld(plan).attention(q, k, v).sum().backward()
mask = torch.from_numpy(dcp.AttnMask.documents([200, 70, 1]).to_dense())
rows = [x.detach().transpose(0, 1) for x in (q, k, v)]
dense = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=mask, enable_gqa=True)
assert torch.allclose(dcp.LocalWorld(plan).attention(q, k, v), dense.transpose(0, 1), atol=1e-5)
assert q.grad.abs().sum() > 0
print("attention of 3 ranks equals dense attention, torch", torch.__version__)
"""


class CannotResolve(Exception):
    """pip's last words."""


def interpreter(version: str) -> str | None:
    """A Python of this version on this machine, if there is one that runs."""
    candidates = [sys.executable, shutil.which(f"python{version}")]
    candidates += sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    for path in filter(None, candidates):
        done = subprocess.run([path, "-c", ask], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == version:
            return path
    return None


def resolve(python: str, *what: str, index: str | None = None) -> dict[str, str]:
    """Name and version of all that ``pip install`` would bring into an empty environment."""
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", "--dry-run"]
    command += ["--ignore-installed", "--quiet", "--report", "-", "--retries", "1"]
    command += [] if index is None else ["--index-url", index]
    done = subprocess.run([*command, *what], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise CannotResolve((errors or done.stderr.splitlines() or ["pip failed"])[0])
    found = json.loads(done.stdout)["install"]
    return {plain(of["metadata"]["name"]): of["metadata"]["version"] for of in found}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def brings_cuda(packages: dict[str, str]) -> bool:
    return any(name.startswith(("nvidia-", "cuda-")) for name in packages)


def torch_build(python: str, torch: str) -> tuple[str | None, dict[str, str]]:
    """The index with the smallest build of a torch, and what it brings."""
    wanted = f"torch=={torch}.*"
    default = resolve(python, wanted)
    if brings_cuda(default):
        try:
            small = resolve(python, wanted, index=CPU_INDEX)
        except CannotResolve:
            return None, default
        if not brings_cuda(small):
            return CPU_INDEX, small
    return None, default


def check_pair(python: str, torch: str, wheel: Path) -> str:
    """What was seen of a pair; raises ``CannotResolve``, ``CalledProcessError``, ``ValueError``."""
    index, of_torch = torch_build(python, torch)
    whole = resolve(python, str(wheel), f"torch=={torch}.*")
    ours = sorted(whole.keys() - of_torch.keys() - {plain(wheel.name.split("-")[0])})
    if len(ours) > MOST_PACKAGES:
        raise ValueError(f"a base install brings {len(ours)} packages: {', '.join(ours)}")
    beside = f"{len(ours)} packages besides torch's"
    if brings_cuda(of_torch):
        return f"resolves, {beside}; not installed: no build without CUDA can be had from here"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        pip = [f"{folder}/bin/pip", "--disable-pip-version-check", "install", "--quiet"]
        more = [] if index is None else ["--index-url", index]
        subprocess.run([*pip, *more, f"torch=={torch}.*"], check=True)
        subprocess.run([*pip, str(wheel)], check=True)
        subprocess.run([f"{folder}/bin/dcp", "--version"], check=True, cwd=folder)
        subprocess.run([f"{folder}/bin/python", "-c", USE], check=True, cwd=folder)
    return f"installed and used, {beside}"


def extras_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode()).get_all("Provides-Extra", [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", default=",".join(PYTHONS))
    parser.add_argument("--torch", default=",".join(TORCHES))
    args = parser.parse_args()
    os.environ.pop("PIP_CONSTRAINT", None)  # which names one torch
    wheel, table, failed, used = args.wheel.resolve(), [], 0, 0
    found = {version: interpreter(version) for version in args.python.split(",")}

    def record(what: str, outcome: str) -> None:
        table.append((what, outcome))
        print(f"{what:22} {outcome}", flush=True)

    for version, python in found.items():
        if python is None:
            record(f"Python {version}", "not on this machine: nothing was tried")
            continue
        for torch in args.torch.split(","):
            try:
                outcome = check_pair(python, torch, wheel)
                used += outcome.startswith("installed")
            except (CannotResolve, subprocess.CalledProcessError, ValueError) as error:
                outcome, failed = f"FAILED: {error}", failed + 1
            record(f"Python {version} torch {torch}", outcome)
    python = next(filter(None, found.values()), None)
    for extra in extras_of(wheel) if python else []:
        what = [f"{wheel}[{extra}]"]
        try:
            outcome = f"resolves to {len(resolve(python, *what))} packages"
        except CannotResolve as error:
            outcome, failed = f"FAILED: {error}", failed + 1
        record(f"extra {extra}", outcome)
    print(f"\n{used} pairs installed and used, {failed} failures, of {len(table)} lines above")
    return 0 if used and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
