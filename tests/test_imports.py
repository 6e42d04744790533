"""Modules import in one direction, type annotations and imports inside functions included."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import dcp

HOME = Path(dcp.__file__).parent


def module_name(path):
    parts = path.relative_to(HOME.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path, known):
    """Modules of this package that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_module_imports_itself_round_others():
    paths = {module_name(path): path for path in HOME.rglob("*.py")}
    graph = {
        name: {other for other in imported(path, paths) if other in paths} - {name}
        for name, path in paths.items()
        if name != "dcp"  # hands out the public names, by and by
    }
    assert "dcp.batch" in graph["dcp.planner"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
