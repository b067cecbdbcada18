"""The picture of a block mask with matplotlib, which is imported when first needed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .block_mask_cells import COLORS, KINDS, Cells, View, ticks, view

if TYPE_CHECKING:
    from .block_mask import BlockMask

_MOST_TICKS = (8, 4)  # down, and across, where long numbers stand side by side
_MOST_LINES = 64  # cells a side up to which they are told apart by lines
_MOST_STRETCHED = 4  # ratio of lengths up to which a query is drawn as large as a key


def plot(
    mask: BlockMask,
    batch: int = 0,
    head: int = 0,
    zoom: Any = None,
    ax: Any = None,
    max_cells: int = 512,
) -> Any:
    """Draw one batch entry and head of a mask with matplotlib.

    Args:
        mask: the mask.
        batch, head: which one; 0 where the mask is the same for all.
        zoom: (row, column) of a block whose elements are drawn in a second panel; "auto" for the first partial block, if
            there is one; or None.
        ax: axes to draw the grid into. The zoomed block is then only marked, and the counts by row are left out.
            Default: a new figure of pyplot.
        max_cells: cells a side. A mask of more blocks is drawn in cells of several, paler the fewer of them are visited.

    Returns:
        The axes of the grid; `axes.figure` is the figure.

    Raises:
        ImportError: without matplotlib.
        IndexError: for a batch, head or block that the mask does not have.
        ValueError: for arguments of another form.
    """
    need_matplotlib()
    shown = view(mask, batch, head, zoom, max_cells)
    if ax is not None:
        _grid(shown, ax)
        return ax
    panels = 1 if shown.zoom is None else 2
    pyplot = import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, panels, figsize=(2 + 5 * panels, 5.5), layout="constrained", squeeze=False)
    _grid(shown, axes[0, 0])
    _strip(shown, axes[0, 0])
    if shown.zoom is not None:
        draw_cells(shown.zoom.elements, axes[0, 1], (1, 1))
        axes[0, 1].set_title(shown.zoom.caption, fontsize="medium")
    figure.suptitle(shown.name)
    return axes[0, 0]


def need_matplotlib() -> None:
    """Raise `ImportError` that says what to install."""
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'flexattn[plot]'") from error


def _grid(shown: View, ax: Any) -> None:
    patches = import_module("matplotlib.patches")
    draw_cells(shown.blocks, ax, shown.block_size)
    ax.set_title("\n".join(filter(None, (shown.facts, shown.note))), fontsize="medium")
    if shown.zoom is not None:
        q, kv = shown.zoom.elements.q_edges, shown.zoom.elements.kv_edges
        for color, width in (("white", 4), ("black", 2)):  # seen on every colour
            place = (kv[0], q[0]), kv[-1] - kv[0], q[-1] - q[0]
            ax.add_patch(patches.Rectangle(*place, fill=False, edgecolor=color, linewidth=width))
    swatches = [patches.Patch(facecolor=c, edgecolor="grey", label=k) for c, k in zip(COLORS, KINDS, strict=True)]
    ax.legend(handles=swatches, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(KINDS), frameon=False)


def _strip(shown: View, ax: Any) -> None:
    """How many blocks a row visits, to the right of the grid."""
    strip = ax.inset_axes((1.14, 0, 0.2, 1), sharey=ax)
    edges = torch.tensor(shown.blocks.q_edges, dtype=torch.float64, device="cpu")
    partial, full = (counts.numpy() for counts in shown.visited_by_row())
    tops, heights = edges[:-1].numpy(), edges.diff().numpy()
    for counts, left, color in ((partial, 0 * partial, COLORS[1]), (full, partial, COLORS[2])):
        strip.barh(tops, counts, heights, left, align="edge", color=color, linewidth=0)
    most = max((partial + full).tolist(), default=0) or 1
    strip.set(
        xlabel="blocks a row", xlim=(0, most), xticks=[0, most], xticklabels=["0", f"{most:.4g}"], ylim=ax.get_ylim()
    )
    strip.tick_params(labelleft=False)


def draw_cells(cells: Cells, ax: Any, units: tuple[int, int]) -> None:
    """The cells as a mesh, with positions of elements along the axes, labelled in steps of `units`."""
    q, kv = cells.q_edges, cells.kv_edges
    lines = {"edgecolors": "white", "linewidth": 0.5} if max(cells.things.shape) <= _MOST_LINES else {}
    if cells.things.numel():
        ax.pcolormesh(kv, q, _colors(cells).numpy(), rasterized=True, **lines)
    lengths = q[-1] - q[0], kv[-1] - kv[0]
    alike = max(lengths) <= _MOST_STRETCHED * min(lengths)
    ax.set(
        xlabel="keys",
        ylabel="queries",
        xlim=(kv[0], max(kv[-1], kv[0] + 1)),
        ylim=(max(q[-1], q[0] + 1), q[0]),
        xticks=ticks(kv[0], kv[-1], units[1], _MOST_TICKS[1]),
        yticks=ticks(q[0], q[-1], units[0], _MOST_TICKS[0]),
        aspect="equal" if alike and min(lengths) else "auto",
    )
    ax.ticklabel_format(style="plain", useOffset=False)


def _colors(cells: Cells) -> Tensor:
    """[R, C, 3]: the colour of each cell, mixed with that of an empty one as its opacity says."""
    table = torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in COLORS], device="cpu").double()
    opacity = cells.opacity.unsqueeze(-1)
    return table[cells.kind] * opacity + table[0] * (1 - opacity)
