"""The documentation runs: every Python block, every printed result, every doctest, and the generated page."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import linecache
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import flexattn
import flexattn.codegen

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODULES = sorted(
    module.name
    for package in (flexattn, flexattn.codegen)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
)


def run(page: Path, block: re.Match[str], namespace: dict[str, Any]) -> str:
    """Execute a block as lines of its page, so that messages name the page and the line; what it printed."""
    name = page.relative_to(ROOT).as_posix()
    code = "\n" * block.string.count("\n", 0, block.start(2)) + block[2]
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, name, "exec"), namespace)
    return printed.getvalue()


def update(page: Path, results: dict[int, str]) -> None:
    """Write what the blocks print into the page: UPDATE_DOCS=1."""
    text = page.read_text()
    for start, printed in sorted(results.items(), reverse=True):
        match = BLOCK.match(text, start)
        assert match is not None
        text = text[: match.start(2)] + printed + text[match.end(2) :]
    page.write_text(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_blocks_of_a_page_run_and_print_what_it_says(page: Path) -> None:
    text = page.read_text()
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    blocks = list(BLOCK.finditer(text))
    results: dict[int, str] = {}
    for number, block in enumerate(blocks):
        if block[1] != "python":
            continue
        printed = run(page, block, namespace)
        following = blocks[number + 1] if number + 1 < len(blocks) else None
        adjacent = following is not None and not text[block.end() : following.start()].strip()
        if following is None or not adjacent or following[1] != "text":
            continue
        results[following.start()] = printed
        if not os.environ.get("UPDATE_DOCS"):
            assert following[2] == printed, f"{page.name}: run with UPDATE_DOCS=1 if the change is meant"
    if os.environ.get("UPDATE_DOCS"):
        update(page, results)


def test_what_the_readme_quotes_is_printed() -> None:
    page = ROOT / "README.md"
    text = page.read_text()
    printed = run(page, next(b for b in BLOCK.finditer(text) if b[1] == "python"), {"__name__": "__docs__"})
    quoted = next(b[2] for b in BLOCK.finditer(text) if b[1] == "text")
    assert quoted in printed


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_some_docstrings_have_examples() -> None:
    counted = {
        name: sum(len(t.examples) for t in doctest.DocTestFinder().find(importlib.import_module(name)))
        for name in MODULES
    }
    for name in ("api", "block_mask", "create", "masks", "mods", "explain", "debug"):
        assert counted[f"flexattn.{name}"] > 0, name


def test_the_generated_page_is_what_the_tables_say() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "generate_docs.py")]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "operations.md").read_text() == printed, "run scripts/generate_docs.py > docs/operations.md"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
