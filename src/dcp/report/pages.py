"""Pages that need nothing but themselves: a template, one style, code and data in one HTML file."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any


def write_page(path: str | Path, template: str, scripts: tuple[str, ...], data: Any) -> Path:
    """Write ``template`` with its style, scripts and ``data`` in it, and return the path.

    The file is replaced as a whole: who opens it meanwhile sees the old page or the new one.
    """
    home = files("dcp.report")

    def read(name: str) -> str:
        return home.joinpath(name).read_text(encoding="utf-8")

    # "</" must not end the script element that holds the data
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    page = read(template)
    page = page.replace("__STYLE__", read("page.css"))
    page = page.replace("__CODE__", "".join(read(name) for name in ("page.js", *scripts)))
    path = Path(path)
    draft = path.with_name(path.name + ".partial")
    draft.write_text(page.replace("__DATA__", text), encoding="utf-8")
    draft.replace(path)
    return path
