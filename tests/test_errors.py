"""Every error that a user can meet names the value that is wrong, or says what to do."""

import ast
from pathlib import Path

import pytest

import dcp

HOME = Path(dcp.__file__).parent
KINDS = {"ValueError", "DCPError", "StrategyError", "TypeError", "TooMany", "ConfigError"}
REMEDIES = (
    *("give", "call", "set ", "need", "leave", "pip install", "use ", "make ", "train with"),
    *(
        "evaluate after",
        "count them",
        "start ",
        "name at least",
        "must be",
        "plan it with",
        "add ",
        "make them",
    ),
)
FILES = sorted(HOME.rglob("*.py"))


def raised(path):
    """(line, message) of every error that is raised with a message."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
            continue
        name = getattr(node.exc.func, "id", getattr(node.exc.func, "attr", ""))
        if name in KINDS and node.exc.args:
            yield node.lineno, node.exc.args[0]


def says_enough(message):
    if isinstance(message, ast.Name):  # what another parser said
        return True
    if any(isinstance(part, ast.FormattedValue | ast.Call) for part in ast.walk(message)):
        return True
    texts = [part.value for part in ast.walk(message) if isinstance(part, ast.Constant)]
    return any(remedy in " ".join(map(str, texts)) for remedy in REMEDIES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOME)))
def test_errors_name_a_value_or_a_remedy(path):
    poor = [f"{path}:{line}" for line, message in raised(path) if not says_enough(message)]
    assert not poor, f"say what is wrong, and what to do: {poor}"


def test_the_walk_sees_errors():
    assert sum(len(list(raised(path))) for path in FILES) > 300
    assert not says_enough(ast.parse("'the data is bad'", mode="eval").body)
