"""What matplotlib is given to draw of a block mask is compared with the dense mask."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from block_pictures import Painted, by_head, causal, cut, true_cells, true_kinds
from matplotlib import pyplot
from torch import Tensor

import flexattn
from flexattn import create_block_mask, create_mask, masks
from flexattn.block_mask_cells import COLORS, EMPTY, FULL, KINDS, PARTIAL
from flexattn.block_mask_picture import svg
from flexattn.block_mask_plot import plot

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_window() -> Iterator[None]:
    pyplot.switch_backend("Agg")
    yield
    pyplot.close("all")


def mesh_of(axes: Any) -> tuple[Tensor, list[float], list[float]]:
    """Colours [R, C, 3] of the only image, and the edges of its rows and columns."""
    (mesh,) = axes.collections
    corners = torch.as_tensor(mesh.get_coordinates())
    assert bool((corners[..., 0] == corners[:1, :, 0]).all()) and bool((corners[..., 1] == corners[:, :1, 1]).all())
    return torch.as_tensor(mesh.get_array()), corners[:, 0, 1].tolist(), corners[0, :, 0].tolist()


def assert_shows(axes: Any, expected: Painted, start: tuple[int, int] = (0, 0)) -> None:
    colors, rows, columns = mesh_of(axes)
    table = torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in COLORS], dtype=torch.float64)
    share = expected.opacity.unsqueeze(-1)
    wanted = table[expected.kind] * share + table[EMPTY] * (1 - share)
    height, width = expected.kind.shape
    sizes = [torch.tensor(e).diff().long() for e in (rows, columns)]
    seen = colors.repeat_interleave(sizes[0], 0).repeat_interleave(sizes[1], 1)
    assert (rows[0], columns[0]) == start and seen.shape == (height, width, 3)
    torch.testing.assert_close(seen, wanted, rtol=0, atol=0.005)  # `expected` is rounded as in SVG
    assert axes.get_xlim() == (columns[0], columns[-1]) and axes.get_ylim() == (rows[-1], rows[0])


@pytest.mark.parametrize("most", [3, 512])
def test_a_plot_shows_the_blocks_the_counts_and_the_elements(most: int) -> None:
    mask, dense = create_block_mask(by_head, 2, 3, 100, 90, "cpu", 16), create_mask(by_head, 2, 3, 100, 90, "cpu")[1, 2]
    kinds = true_kinds(dense, (16, 16))
    axes = plot(mask, 1, 2, (6, 1), max_cells=most)
    assert_shows(axes, true_cells(kinds, most, (16, 16), (100, 90)))
    other = axes.figure.axes[1]
    elements = torch.where(dense[96:100, 16:32], FULL, EMPTY)
    assert_shows(other, true_cells(elements, most, (1, 1), (4, 16)), (96, 16))
    assert other.get_title().startswith("block (6, 1), partial")
    (strip,) = axes.child_axes
    bars = [[(b.get_x(), b.get_y(), b.get_width(), b.get_height()) for b in c] for c in strip.containers]
    rows = cut(7, most)
    for i, (top, bottom) in enumerate(pairwise(rows)):
        p, f = ((kinds[top:bottom] == k).sum().item() / (bottom - top) for k in (PARTIAL, FULL))
        y, height = top * 16, min(bottom * 16, 100) - top * 16
        assert [bars[0][i], bars[1][i]] == [pytest.approx((0, y, p, height)), pytest.approx((p, y, f, height))]
    assert strip.get_ylim() == axes.get_ylim()
    marks = [(p.get_xy(), p.get_width(), p.get_height()) for p in axes.patches]
    assert marks == [((16, 96), 16, 4)] * 2
    assert [t.get_text() for t in axes.get_legend().get_texts()] == list(KINDS)
    assert axes.figure._suptitle.get_text() == "by_head, batch 1, head 2"
    assert f"sparsity {mask[1:, 2:].sparsity():.2f} %" in axes.get_title()
    axes.figure.canvas.draw()


def test_given_axes_get_the_grid_alone() -> None:
    figure = matplotlib.figure.Figure()
    ax = figure.add_subplot()
    assert plot(causal(64, 16), zoom=(1, 1), ax=ax) is ax
    assert_shows(ax, true_cells(true_kinds(torch.ones(64, 64).tril().bool(), (16, 16)), 9, (16, 16), (64, 64)))
    assert figure.axes == [ax] and ax.child_axes == [] and len(ax.patches) == 2
    assert pyplot.get_fignums() == []


def test_a_plot_is_a_figure_of_pyplot_that_a_notebook_shows() -> None:
    axes = plot(causal(64, 16))
    assert [pyplot.figure(n) for n in pyplot.get_fignums()] == [axes.figure] and axes.figure.axes == [axes]


@pytest.mark.parametrize("lengths", [(0, 0), (0, 40), (40, 0), (1, 1), (1, 5000), (5000, 1)])
def test_masks_without_elements_and_thin_ones_are_drawn(lengths: tuple[int, int]) -> None:
    axes = plot(create_block_mask(masks.noop_mask, None, None, *lengths, "cpu", 16), zoom="auto")
    axes.figure.canvas.draw()
    assert len(axes.collections) == (0 not in lengths)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'flexattn\[plot\]'"):
        plot(causal(64, 16))
    assert svg(causal(64, 16)).startswith("<svg")
    assert 'plot = ["matplotlib"]' in (ROOT / "pyproject.toml").read_text()


def test_matplotlib_is_not_imported_with_the_package() -> None:
    source = (Path(flexattn.__file__).parent / "block_mask_plot.py").read_text()
    assert not re.search(r"^\s*(import|from) matplotlib", source, re.MULTILINE)
