"""What mkdocs makes at build time, so that it is never out of date: the names of the reference,
options read from the parsers, and the examples as pages.

A page asks for a part by a line of its own: ``<!-- names: dcp.data -->``, ``<!-- commands -->``,
``<!-- options: planned -->``.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(
    p for p in (ROOT / "examples").iterdir() if p.suffix in (".py", ".yaml", ".ipynb")
)
PART = re.compile(r"^<!-- (names|commands|options|examples)(?:: (\S+))? -->$", flags=re.MULTILINE)
FILE = re.compile(r"\[[\w/.]+\.md\]\(([\w/.]+\.md)")
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):<code>(~?)([\w.]+)</code>")


# ------------------------------------------------------------------------------ what mkdocs calls


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """A page for each example, beside ``docs/``."""
    for path in EXAMPLES:
        page = _example_page(path)
        files.append(File.generated(config, f"examples/{path.stem}.md", content=page))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Make the parts that the page asks for, and lead links to examples to their pages."""
    if page.parent is None or len(page.parent.children) == 1:
        page.meta["hide"] = ["navigation"]  # of one line
    made = PART.sub(lambda part: PARTS[part[1]](part[2] or ""), markdown)
    made = FILE.sub(lambda link: f"[{_title(page, link[1])}]({link[1]}", made)
    return re.sub(r"\]\(((?:\.\./)*)\.\./examples/(\w+)\.\w+\)", r"](\1examples/\2.md)", made)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name others in Sphinx's way: make them links, where the reference has them."""

    def link(role: re.Match[str]) -> str:
        name = role[2].rpartition(".")[2] if role[1] else role[2]
        return f'<autoref identifier="{role[2]}" optional><code>{name}</code></autoref>'

    return ROLE.sub(link, html)


# ------------------------------------------------------------------------------ the parts


def _title(page: Page, target: str) -> str:
    """What a page is about, for links that show a file's name."""
    path = ROOT / "docs" / Path(page.file.src_uri).parent / target
    heading = path.read_text(encoding="utf-8").partition("\n")[0]
    return re.split("[:,]", heading.removeprefix("# "))[0]


def _example_page(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return "\n\n".join(_cell(each) for each in json.loads(text)["cells"])
    if path.suffix == ".yaml":
        return f"# {path.name}\n\n```yaml\n{text}```\n"
    about = re.sub(r"^(torchrun|python) ", r"    \1 ", _about(path), flags=re.MULTILINE)
    return f"# {path.name}\n\n{about}\n\n```python\n{text}```\n"


def _about(path: Path) -> str:
    """What an example says of itself: docstring, first cell, or first comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return _cell(json.loads(text)["cells"][0]).partition("\n\n")[2]
    if path.suffix == ".yaml":
        return f"`{text.partition(chr(10))[0].removeprefix('# ')}`"
    return (ast.get_docstring(ast.parse(text)) or "").replace("``", "`")


def _cell(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    return f"```python\n{text}\n```" if cell["cell_type"] == "code" else text


def _examples(_: str) -> str:
    """A table of the programs, with the first sentence that each says of itself."""
    rows = ["| program | |", "|---|---|"]
    for path in EXAMPLES:
        about = " ".join(_about(path).partition("\n\n")[0].split())
        rows.append(f"| [{path.name}]({path.stem}.md) | {about} |")
    return "\n".join(rows)


def _names(module: str) -> str:
    parts = []
    for name, home in sorted(_public(module)):
        full = f"{module}.{name}"
        if home != full:  # the heading's own anchor is where the name is defined
            parts.append(f'<span id="{full}" class="doc-name"></span>')
        parts.append(f"::: {home}\n    options:\n      heading: {full}\n      toc_label: {name}")
    return "\n\n".join(parts)


def _public(module: str) -> list[tuple[str, str]]:
    """Every name of ``__all__``, and where mkdocstrings finds it.

    Integrations are read, not imported: the framework need not be installed.
    """
    if ".integrations." in module:
        path = ROOT / "src" / Path(*module.split(".")).with_suffix(".py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                return [(name, f"{module}.{name}") for name in ast.literal_eval(node.value)]
    found = import_module(module)
    homes = ((name, getattr(getattr(found, name), "__module__", None)) for name in found.__all__)
    return [(name, f"{home or module}.{name}") for name, home in homes]


def _commands(_: str) -> str:
    from dcp.cli import _COMMANDS, _build_parser

    parts = []
    for name, command in _COMMANDS.items():
        title = f"## dcp {name}\n\n"
        if name == "train":
            parts.append(f"{title}{command.help}: [its options](configuration.md).")
            continue
        parser = _build_parser(name.split())
        for word in name.split():
            (level,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
            parser = level.choices[word]
        parts.append(f"{title}```text\n{_help(parser)}```")
    return "\n\n".join(parts)


def _help(parser: argparse.ArgumentParser) -> str:
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "88"  # by which argparse breaks lines
    try:
        return parser.format_help()
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _options(job: str) -> str:
    """A table for each group of a job's options; of other jobs than planned, what that has not."""
    from dcp.jobs import PLANNED, build_parser
    from dcp.train.arguments import RunArguments

    planned = {group.title for group in build_parser(PLANNED)._action_groups}
    parts = []
    for group in build_parser(job)._action_groups:
        actions = [each for each in group._group_actions if each.option_strings[-1] != "--help"]
        if not actions or (job != PLANNED and group.title in planned):
            continue
        title, rest = group.title, ""
        if title == "transformers.TrainingArguments":
            trainers = [each for each in actions if each.dest not in RunArguments.__annotations__]
            actions = [each for each in actions if each not in trainers]
            names = ", ".join(f"`{each.option_strings[-1]}`" for each in trainers)
            title = "run"
            rest = f"\n\nAnd Trainer's own {len(trainers)}: {names}."
        parts.append(f"### {title}\n\n{_table(actions)}{rest}")
    return "\n\n".join(parts)


def _table(actions: list[argparse.Action]) -> str:
    rows = ["| option | default | |", "|---|---|---|"]
    for action in actions:
        names = " ".join(f"`{n}`" for n in action.option_strings if "_" not in n)
        default = "" if action.default in ("", None, argparse.SUPPRESS) else f"`{action.default}`"
        said = (action.help or "").replace("%%", "%").replace("|", "\\|")
        if action.choices:
            said += f" ({', '.join(f'`{c}`' for c in action.choices)})"
        rows.append(f"| {names} | {default} | {said} |")
    return "\n".join(rows)


PARTS = {"names": _names, "commands": _commands, "options": _options, "examples": _examples}
