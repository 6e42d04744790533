"""Run the Python blocks and ``dcp`` commands of a page, in their order and in one namespace.

A block that opens with ``py`` instead of ``python`` is shown only.

    python scripts/run_readme.py README.md [--without PACKAGE]

``--without``: leave out, and name, the blocks that need PACKAGE and those that build on them.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from dcp.cli import main as dcp

PYTHON = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^    dcp (.*)$", flags=re.MULTILINE)


def run_blocks(text: str, *, without: str | None = None) -> dict[str, Any]:
    """Run every Python block of a page's text; the names they leave."""
    names: dict[str, Any] = {"__name__": "readme"}
    for number, block in enumerate(PYTHON.findall(text)):
        try:
            exec(compile(block, f"block {number}", "exec"), names)
        except (ModuleNotFoundError, NameError) as error:
            missing = isinstance(error, NameError) or (error.name or "").startswith(without or "/")
            if without is None or not missing:
                raise
            print(f"left out block {number}: {error}")
    return names


def commands(text: str) -> list[str]:
    """What follows ``dcp`` on the page's command lines."""
    return COMMAND.findall(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--without", metavar="PACKAGE")
    args = parser.parse_args()
    page = args.page.read_text(encoding="utf-8")
    run_blocks(page, without=args.without)
    for words in commands(page):
        if args.without is None or words.split()[0] in ("plan", "compare"):
            print(f"dcp {words}", flush=True)
            if status := dcp(shlex.split(words)):
                sys.exit(status)
