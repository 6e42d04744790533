"""The documentation builds strictly, names everything, runs, and a browser shows it."""

import ast
import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from dcp.cli import _COMMANDS
from scripts.run_readme import run_blocks

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = ("dcp", "dcp.data", "dcp.datacentric", "dcp.inference")
INTEGRATIONS = [
    f"dcp.integrations.{path.stem}"
    for path in sorted((ROOT / "src/dcp/integrations").glob("*.py"))
    if re.search(r"^__all__ = ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
]
# mkdocs in a process that can reach no other machine
OFFLINE = """
import socket, sys
def refuse(*_, **__): raise OSError("the site must build without a network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(["build", "--strict", "--site-dir", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site's folder."""
    for package in ("material", "mkdocstrings", "transformers"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


# ------------------------------------------------------------------------------ links and names


class _Page(HTMLParser):
    """The anchors of a page, what it links to, and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors.update(filter(None, (found.get("id"), found.get("name"))))
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("img", "script", "iframe", "source", "video") and found.get("src"):
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.append(found["href"])


def test_all_links_and_anchors_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    pages = {path: _Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 25
    lost = []
    for path, page in pages.items():
        for target in [*page.links, *page.loads]:
            if re.match(r"(https?:|mailto:)", target):
                if target in page.loads:
                    lost.append((path.name, target, "is loaded from another machine"))
                continue
            name, anchor = urldefrag(unquote(target))
            aim = (path.parent / name).resolve() if name else path
            if aim.is_dir():
                aim = aim / "index.html"
            if not aim.exists():
                lost.append((path.name, target, "no such file"))
            elif anchor and aim in pages and anchor not in pages[aim].anchors:
                lost.append((path.name, target, "no such anchor"))
    assert not lost, lost
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?https?:", style.read_text(encoding="utf-8"))


def _names(module):
    """Its ``__all__``, of an integration without importing it: its framework may be missing."""
    if module in PACKAGES:
        return import_module(module).__all__
    source = (ROOT / "src" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    return re.findall(r'"(\w+)"', re.search(r"^__all__ = \[(.*?)\]", source, re.M | re.S)[1])


def test_every_public_name_is_in_the_reference(site):
    for module in [*PACKAGES, *INTEGRATIONS]:
        page = "integrations" if module in INTEGRATIONS else "python"
        path = site / "reference" / f"{page}.html"
        anchors, text = _Page(path).anchors, path.read_text(encoding="utf-8")
        for name in _names(module):
            assert f"{module}.{name}" in anchors
            assert re.search(rf"</code>\s+{re.escape(module)}\.{name}\s", text), name


def test_every_command_and_option_is_in_the_reference(site):
    from dcp.jobs import JOBS, build_parser

    commands = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for name in _COMMANDS:
        assert f">dcp {name}<" in commands, name
    options = (site / "reference" / "configuration.html").read_text(encoding="utf-8")
    for job in JOBS:
        for action in build_parser(job)._actions:
            name = action.option_strings[-1]
            assert f"<code>{name}</code>" in options or name == "--help", name


def test_no_page_but_the_figures_is_long():
    for path in DOCS.rglob("*.md"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 250 or path.name == "measured.md", f"{path.name} has {lines} lines"


# ------------------------------------------------------------------------------ what pages say


def _strings():
    """Every string of the library, ``…`` where a value is put in."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                yield "".join(parts)


def test_quoted_messages_are_in_the_code():
    page = (DOCS / "faq.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^> `(.+)`$", page, flags=re.MULTILINE)
    assert len(quoted) > 30
    code = "\n".join(_strings())
    assert [message for message in quoted if message not in code] == []


SNIPPETS = ["index.md", "finetune.md"]  # tutorials/serving.md: tests/test_generate.py
SNIPPETS += [f"tutorials/{name}.md" for name in ("loop", "masks", "rl")]


@pytest.mark.parametrize("page", SNIPPETS)
def test_snippets_run_from_top_to_bottom(page, tmp_path, monkeypatch):
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)
    names = run_blocks((DOCS / page).read_text(encoding="utf-8"))
    if page == "tutorials/rl.md":
        assert names["pairs"].tokens_saved == 8 * (len("2 + 2 = ") - 1)
        assert [len(values) for values in names["by_answer"]] == [2, 1, 3]


# ------------------------------------------------------------------------------ in a browser

FRAMES = """
<iframe width=1280 height=900 src=index.html></iframe>
<iframe width=390 height=900 src=index.html></iframe>
<pre id=said></pre>
<script>
onload = () => setTimeout(() => {
  const look = frame => {
    const page = frame.contentDocument
    return {
      title: page.title,
      width: page.documentElement.scrollWidth,
      window: frame.contentWindow.innerWidth,
      pictures: [...page.images].map(image => image.naturalWidth),
    }
  }
  said.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(look))
}, 500)
</script>
"""
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def address(site):
    """Where the site is served while a test runs."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with")
def test_a_browser_shows_the_start_page(site, address, tmp_path):
    """No errors, nothing asked of other machines, no page wider than the window."""
    # Headless windows are 500 pixels wide at least: pages are looked at in frames.
    frame = site / "frames.html"
    frame.write_text(FRAMES)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--enable-logging=stderr",
    ]
    shown = subprocess.run(
        [*command, "--virtual-time-budget=8000", "--dump-dom", f"{address}/{frame.name}"],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    said = json.loads(re.search(r'<pre id="said">(.*?)</pre>', shown.stdout)[1])
    assert [each["window"] for each in said] == [1280, 390]
    for page in said:
        assert page["title"].startswith("Start here")
        assert page["width"] <= page["window"]
        assert page["pictures"]
        assert all(page["pictures"])
    assert not re.findall(r"CONSOLE.*", shown.stderr)
