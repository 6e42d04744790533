"""What an installation brings: few packages, and extras whose names and versions make sense."""

import ast
import importlib.metadata
import re
import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHECK = runpy.run_path(str(ROOT / "scripts/check_versions.py"))


def closure(requirements):
    """Names of the distributions that requirements bring here, without extras."""
    requirement = pytest.importorskip("packaging.requirements").Requirement
    found, left = set(), list(requirements)
    while left:
        wanted = requirement(left.pop())
        name = CHECK["plain"](wanted.name)
        if name in found or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        left += importlib.metadata.requires(name) or []
    return found


def test_a_base_installation_is_small():
    torch = [each for each in PROJECT["dependencies"] if each.startswith("torch")]
    ours = closure(PROJECT["dependencies"]) - closure(torch)
    assert {"numpy", "numba", "mtkahypar"} <= ours
    assert len(ours) <= CHECK["MOST_PACKAGES"] < 10


def test_pythons_and_torches_are_those_that_are_checked():
    spec = pytest.importorskip("packaging.specifiers").SpecifierSet
    torch = spec(next(each for each in PROJECT["dependencies"] if "torch" in each)[5:])
    assert all(f"{version}.0" in torch for version in CHECK["TORCHES"])
    assert "2.10.0" not in torch
    assert all(f"{v}.0" in spec(PROJECT["requires-python"]) for v in CHECK["PYTHONS"])
    assert "3.10.0" not in spec(PROJECT["requires-python"])


def test_what_pip_says_is_understood(monkeypatch, tmp_path):
    """Against a pip that answers as told: what is installed, what is CUDA's, what fails."""
    python = tmp_path / "python"

    def answers(script):
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)

    report = '{"install": [{"metadata": {"name": "Nvidia_CuFFT", "version": "12"}}]}'
    answers(f"echo '{report}'")
    found = CHECK["resolve"](str(python), "torch==2.11.*")
    assert found == {"nvidia-cufft": "12"}
    assert CHECK["brings_cuda"](found)
    answers("echo 'ERROR: no such thing' >&2; exit 1")
    with pytest.raises(CHECK["CannotResolve"], match="no such thing"):
        CHECK["resolve"](str(python), "torch==9.9.*")
    # where the CPU's index cannot be reached, the default build stands, and is named as CUDA's
    answers(f"case \"$*\" in *--index-url*) exit 1;; *) echo '{report}';; esac")
    assert CHECK["torch_build"](str(python), "2.11") == (None, found)


def test_pages_and_types_are_in_the_package():
    """Every file that a page is made of lies in the package, from where it is read."""
    home = ROOT / "src/dcp/report"
    named = set()
    for path in home.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named |= set(re.findall(r"^\w+\.(?:html|js|css)$", node.value))
    assert named == {
        path.name for path in home.iterdir() if path.suffix in (".html", ".js", ".css")
    }
    assert (ROOT / "src/dcp/py.typed").exists()
