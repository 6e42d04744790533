"""The page that lists all figures: what each shows, how it was made, where its numbers are from."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
section { border-top: 1px solid #ccc; padding: 1rem 0 } img { max-width: 100% }
code { background: #f3f3f3; padding: .1rem .3rem } table { border-collapse: collapse }
td, th { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top }
"""


@dataclass(frozen=True)
class Entry:
    """One figure of the page; its files are named after it."""

    name: str
    title: str
    command: str
    sources: tuple[str, ...]


def write_page(
    folder: Path,
    entries: Sequence[Entry],
    *,
    lengths: Mapping[str, str],
    headline: Sequence[tuple[str, str, str]] = (),
) -> Path:
    """Write ``report.html``, pictures included, beside the figures; returns its path.

    Args:
        lengths: where the documents' lengths are from, by data set.
        headline: what, ours, published: the first table.
    """
    origin = "".join(f"<li>{escape(name)}: {escape(lengths[name])}</li>" for name in lengths)
    contents = "".join(
        f'<tr><td><a href="#{e.name}">{e.name}</a></td><td>{escape(e.title)}</td>'
        f"<td>{escape(', '.join(source.split(':')[0] for source in e.sources))}</td></tr>"
        for e in entries
    )
    numbers = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in headline
    )
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>The paper\'s figures</title>'
        f"<style>{_STYLE}</style><h1>The paper's figures, redrawn</h1>"
        f"<p>Document lengths:</p><ul>{origin}</ul>{_conditions(folder)}"
        f"<table><tr><th></th><th>ours</th><th>published</th></tr>{numbers}</table><p></p>"
        f"<table><tr><th>figure</th><th>shows</th><th>numbers are</th></tr>{contents}</table>"
        + "".join(_section(folder, entry) for entry in entries)
        + "</html>\n"
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _section(folder: Path, entry: Entry) -> str:
    picture = base64.b64encode((folder / f"{entry.name}.png").read_bytes()).decode()
    sources = "".join(f"<li>{escape(source)}</li>" for source in entry.sources)
    files = " · ".join(
        f'<a href="{entry.name}.{ending}">{ending.upper()}</a>' for ending in ("pdf", "png", "csv")
    )
    return (
        f'<section id="{entry.name}"><h2>{entry.name}: {escape(entry.title)}</h2>'
        f'<img alt="{escape(entry.title)}" src="data:image/png;base64,{picture}">'
        f"<ul>{sources}</ul><p><code>{escape(entry.command)}</code> — {files}</p></section>"
    )


def _conditions(folder: Path) -> str:
    """The machine that the newest rows were made on."""
    notes = [path for path in (folder / "data").glob("*.json") if path.with_suffix(".csv").exists()]
    kept = sorted(notes, key=lambda path: path.stat().st_mtime)
    if not kept:
        return ""
    where = json.loads(kept[-1].read_text())
    return (
        f"<p>Planned, simulated and measured on {escape(str(where['processor']))}, "
        f"{where['num_cores']} cores, Python {where['python']}, {where['date']}.</p>"
    )
