"""Modules import in one direction, type annotations and imports inside functions included."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest

import dcp

HOME = Path(dcp.__file__).parent
# A file imports only what stands before its room here (docs/architecture.md draws it).
PLANNING = (
    *(
        "errors",
        "checks",
        "ragged",
        "slices",
        "mask_mod",
        "mask_names",
        "packing",
        "pictures",
        "masks",
        "batch",
        "blocks",
        "kernel_table",
        "cluster",
        "cost",
        "wire",
        "tables",
    ),
    *(
        "placement",
        "transfers",
        "schedule",
        "buffers",
        "compile",
        "received",
        "stats",
        "program",
        "events",
        "simulate",
    ),
    *("layer", "rates", "plans", "candidates", "planner", "halves"),
)
RUNNING = (
    *("runtime", "launch", "data", "integrations", "report", "train", "datacentric", "inference"),
    *("bench", "profile", "doctor", "jobs", "plan_command", "cli"),
)
ROOMS = [*PLANNING, *RUNNING]


def module_name(path):
    parts = path.relative_to(HOME.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path, known):
    """Modules that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


PATHS = {module_name(path): path for path in HOME.rglob("*.py")}
IMPORTS = {name: set(imported(path, PATHS)) for name, path in PATHS.items()}
# the package's own file hands out the public names, by and by
INSIDE = {name: (of & set(PATHS)) - {name} for name, of in IMPORTS.items() if name != "dcp"}


def room(module):
    return module.split(".")[1]


def test_no_module_imports_itself_round_others():
    assert "dcp.batch" in INSIDE["dcp.planner"]
    TopologicalSorter(INSIDE).prepare()  # raises CycleError, which names the circle


def test_every_room_imports_only_those_above_it():
    place = {name: index for index, name in enumerate(ROOMS)}
    assert {room(name) for name in INSIDE} == set(ROOMS)
    wrong = {
        f"{name} imports {other}"
        for name, others in INSIDE.items()
        for other in others - {"dcp"}
        if place[room(other)] > place[room(name)]
    }
    assert not wrong


def test_the_library_never_imports_the_laboratory():
    assert not [name for name in chain(*IMPORTS.values()) if name.split(".")[0] in ("lab", "tests")]


def test_planning_imports_no_torch():
    # mask_mod tries it, for a FlexAttention function, where it is installed and only then
    found = [
        name for name in INSIDE if room(name) in PLANNING and "torch" in IMPORTS[name] - {"dcp"}
    ]
    assert found == ["dcp.mask_mod"]
    code = "import sys, dcp.planner; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_plan_is_a_function_and_no_module():
    assert callable(dcp.plan)
    assert dcp.plan.__module__ == "dcp.planner"
    with pytest.raises(ModuleNotFoundError):
        import_module("dcp.plan")


def test_every_public_name_is_there():
    assert set(dcp.__all__) <= set(dir(dcp))
    assert all(getattr(dcp, name) is not None for name in dcp.__all__)
    assert issubclass(dcp.StrategyError, ValueError)
    assert issubclass(dcp.PlanningError, RuntimeError)
