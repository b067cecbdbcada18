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
import torch
import torch.nn.attention.flex_attention as theirs

import flexattn
import flexattn.codegen
import flexattn_command
from flexattn import masks

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODULES = sorted(
    module.name
    for package in (flexattn, flexattn.codegen, flexattn_command)
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
    """Write what the blocks print into the page: UPDATE_DOCS=1. Twice, where an output that grew moves quoted lines."""
    text = page.read_text()
    for start, printed in sorted(results.items(), reverse=True):
        match = BLOCK.match(text, start)
        assert match is not None
        text = text[: match.start(2)] + printed + text[match.end(2) :]
    page.write_text(text)


def test_the_picture_is_that_of_its_mask() -> None:
    mask = flexattn.create_block_mask(masks.sliding_window(100), None, None, 512, 512, device="cpu", BLOCK_SIZE=32)
    picture = mask.to_svg(zoom="auto", title="sliding_window(100), blocks of 32") + "\n"
    place = ROOT / "docs" / "images" / "sliding-window.svg"
    if os.environ.get("UPDATE_DOCS"):
        place.parent.mkdir(exist_ok=True)
        place.write_text(picture)
    assert place.read_text() == picture, "run with UPDATE_DOCS=1 if the change is meant"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_blocks_of_a_page_run_and_print_what_it_says(page: Path) -> None:
    text = page.read_text()
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    blocks = list(BLOCK.finditer(text))
    results: dict[int, str] = {}
    assert page.name == "operations.md" or any(b[1] == "python" for b in blocks), f"{page.name} shows no code"
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


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="the README compares with PyTorch 2.13")
def test_what_the_readme_says_of_pytorch() -> None:
    q, k, v = (torch.randn(1, 2, 256, 16) for _ in range(3))
    three = torch.randn(3, 2, 256, 16)
    first_block = torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 2, dtype=torch.int32)
    of_first_block = torch.softmax(q @ k[:, :, :128].mT / 4, -1) @ v[:, :, :128]
    of_all = torch.softmax(q @ k.mT / 4, -1) @ v
    unknown = {"BLOK_M": 64}

    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        theirs.flex_attention(three.clone().requires_grad_(), three, three)
    with pytest.warns(UserWarning, match="materializes the full scores matrix"):
        theirs._WARNINGS_SHOWN.clear()
        theirs.flex_attention(q, k, v)
    lists = theirs.BlockMask.from_kv_blocks(*first_block)
    torch.testing.assert_close(theirs.flex_attention(q, k, v, block_mask=lists), of_all)
    for_two = theirs.create_block_mask(masks.causal_mask, 2, None, 256, 256, "cpu")
    assert theirs.flex_attention(three, three, three, block_mask=for_two).shape == three.shape
    with pytest.raises(RuntimeError, match="sliced BlockMask"):
        theirs.flex_attention(three[:2, :, 128:], three[:2], three[:2], block_mask=for_two[:, :, 1:])
    assert theirs.flex_attention(q, k, v, kernel_options=unknown).shape == q.shape  # type: ignore[arg-type]

    lists = flexattn.BlockMask.from_kv_blocks(*first_block)
    torch.testing.assert_close(flexattn.flex_attention(q, k, v, block_mask=lists), of_first_block)
    for_two = flexattn.create_block_mask(masks.causal_mask, 2, None, 256, 256, "cpu")
    with pytest.raises(ValueError, match="B=2 but query has batch 3"):
        flexattn.flex_attention(three, three, three, block_mask=for_two)
    whole = flexattn.flex_attention(three[:2], three[:2], three[:2], block_mask=for_two)
    tail = flexattn.flex_attention(three[:2, :, 128:], three[:2], three[:2], block_mask=for_two[:, :, 1:])
    torch.testing.assert_close(tail, whole[:, :, 128:])
    with pytest.raises(ValueError, match="'BLOK_M'"):
        flexattn.flex_attention(q, k, v, kernel_options=unknown)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_some_docstrings_have_examples() -> None:
    counted = {
        name: sum(len(t.examples) for t in doctest.DocTestFinder().find(importlib.import_module(name)))
        for name in MODULES
    }
    for name in ("api", "block_mask", "create", "masks", "mods", "explain", "debug", "inspection"):
        assert counted[f"flexattn.{name}"] > 0, name


def test_the_generated_page_is_what_the_tables_say() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "generate_docs.py")]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "operations.md").read_text() == printed, "run scripts/generate_docs.py > docs/operations.md"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_tables_of_compiled_features_are_those_of_the_records() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        feature_table = importlib.import_module("feature_table")
    finally:
        sys.path.pop(0)
    text = feature_table.PAGE.read_text()
    assert feature_table.page(text) == text, "run python scripts/feature_table.py"
    marked = set()
    for path in [*(ROOT / "tests" / "cpu").glob("*.py"), *(ROOT / "tests" / "compiled").glob("*.py")]:
        marked |= set(re.findall(r"""mark\.feature\(["'](.*?)["']\)""", path.read_text()))
    pinned = re.search(r"torch==([\d.]+)", (ROOT / "constraints.txt").read_text())
    assert pinned is not None
    record = next(r for r in feature_table.records() if r["torch"] == pinned[1])
    assert marked <= set(record["features"]), "write the record of this version again: see scripts/feature_table.py"
    assert not any(counts["failed"] for counts in record["features"].values())
