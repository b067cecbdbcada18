"""Pictures of scores, weights and masks, element by element, with matplotlib, which is imported when first needed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from .block_mask import BlockMask
from .block_mask_cells import COLORS, EMPTY, ticks, view
from .block_mask_plot import draw_cells, need_matplotlib
from .create import create_block_mask
from .inspection import Inspection, Selection, inspect
from .mask_object import name_of

HIDDEN = "#C8C8C8"  # hidden by the mask in a block that is visited; what is skipped has the colour of an empty block
NOT_FINITE = "#D62728"  # an attended element whose value is nan or infinite
_COLORMAP = "viridis"  # has no grey in it
_LABELS = {
    "weight": "softmax weight",
    "score": "score: scale · ⟨query, key⟩",
    "modified": "score after score_mod",
}
_MOST_TICKS = (8, 6)
_MOST_CELLS = 512
_MOST_ELEMENTS = 1 << 28


def plot_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    mask_mod: Callable[..., Tensor] | None = None,
    *,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    b: int = 0,
    h: int = 0,
    q_idx: Selection = None,
    kv_idx: Selection = None,
    what: Literal["weight", "score", "modified"] = "weight",
    ax: Any = None,
) -> Any:
    """Draw the weights or scores of one batch entry and head with matplotlib (`pip install 'flexattn[plot]'`).

    An element that is not attended, or whose modified score is -inf, has no value in the picture: it is grey, lighter where
    its whole block is skipped. An attended one whose value is nan or infinite is red. Weights are coloured by their square
    root.

    Args:
        query, key, value, score_mod, mask_mod, block_mask, scale, enable_gqa, b, h, q_idx, kv_idx: as `inspect`.
        what: "weight" after the softmax, "score" before score_mod, or "modified" after it.
        ax: axes to draw into. Default: a new figure of pyplot.

    Returns:
        The axes; `axes.figure` is the figure.

    Raises:
        ImportError: without matplotlib.
        ValueError: for another `what`; and what `inspect` raises.
    """
    if what not in _LABELS:
        raise ValueError(f"what is {what!r}; choose one of {', '.join(map(repr, _LABELS))}")
    need_matplotlib()
    found = inspect(
        query,
        key,
        value,
        score_mod,
        mask_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=enable_gqa,
        b=b,
        h=h,
        q_idx=q_idx,
        kv_idx=kv_idx,
    )
    mods = (score_mod, mask_mod if block_mask is None else block_mask.mask_mod)
    title = [f"batch {found.b}, head {found.h}", *(name_of(mod) for mod in mods if mod is not None)]
    return _drawn(found, what, ", ".join(title), _axes() if ax is None else ax)


def _drawn(found: Inspection, what: str, title: str, ax: Any) -> Any:
    """The axes, with the picture of what was found."""
    rows, columns = ((i,) if isinstance(i, int) else i for i in (found.q_idx, found.kv_idx))
    shape = len(rows), len(columns)
    values, mask, block = (t.reshape(shape) for t in (getattr(found, what), found.mask, found.block))
    attended = mask if what == "score" else mask & (found.modified.reshape(shape) != -torch.inf)
    broken = attended & ~values.isfinite()
    known = values[attended & ~broken]
    colors = import_module("matplotlib.colors")
    scalars = import_module("matplotlib.cm").ScalarMappable(_norm(what, known), _COLORMAP)
    if values.numel():
        image = torch.as_tensor(scalars.to_rgba(values.masked_fill(~attended | broken, 0.0).numpy(), bytes=True))[
            ..., :3
        ]
        for color, where in (
            (HIDDEN, ~attended & (block != EMPTY)),
            (COLORS[EMPTY], ~attended & (block == EMPTY)),
            (NOT_FINITE, broken),
        ):
            image[where] = torch.tensor([round(255 * c) for c in colors.to_rgb(color)], dtype=torch.uint8)
        ax.imshow(image.numpy(), interpolation="nearest", aspect="equal" if _alike(shape) else "auto")
        ax.figure.colorbar(scalars, ax=ax, label=_LABELS[what])
    _label(ax, rows, columns)
    ax.set_title(title, fontsize="medium")
    _legend(ax, bool(broken.any()))
    return ax


def plot_mask(
    mask: Callable[..., Tensor] | BlockMask,
    shape: int | tuple[int, ...] | None = None,
    *,
    b: int = 0,
    h: int = 0,
    ax: Any = None,
    device: torch.device | str | None = None,
) -> Any:
    """Draw which elements a mask_mod attends to, or the blocks of a block mask, with matplotlib.

    Args:
        mask: a mask_mod, whose elements are drawn, up to 512 cells a side, paler where a cell holds several of which only
            some are attended; or a `BlockMask`, drawn as by its `plot`.
        shape: of a mask_mod's mask: a length, (Q_LEN, KV_LEN), or (B, H, Q_LEN, KV_LEN). A block mask has its own.
        b, h: batch entry and head. A `shape` without B and H has as many of them as it takes.
        ax: axes to draw into. Default: a new figure of pyplot.
        device: where a mask_mod is evaluated: that of the tensors it captures. Default: the accelerator, else the CPU.

    Returns:
        The axes; `axes.figure` is the figure.

    Raises:
        ImportError: without matplotlib.
        IndexError: for a batch entry or head that the mask does not have.
        TypeError, ValueError: for what is no mask, and for a shape that is none.
    """
    need_matplotlib()
    if isinstance(mask, BlockMask):
        if shape is not None:
            raise ValueError(
                f"shape={shape!r} is given with a block mask, which has its own, {mask.shape}; leave it out"
            )
        return mask.plot(b, h, ax=ax)
    if not callable(mask):
        raise TypeError(
            f"mask is a {type(mask).__name__}; pass a function (b, h, q_idx, kv_idx) -> bool, or a BlockMask"
        )
    if shape is None:
        raise ValueError("a mask_mod has no lengths of its own; say what to draw: plot_mask(mask_mod, (Q_LEN, KV_LEN))")
    from .testing.sizes import mask_shape

    B, H, Q_LEN, KV_LEN = mask_shape(shape)
    if Q_LEN * KV_LEN > _MOST_ELEMENTS:
        raise ValueError(
            f"{Q_LEN} × {KV_LEN} elements are too many to evaluate for a picture. Draw the blocks instead: "
            f"plot_mask(create_block_mask(mask_mod, None, None, {Q_LEN}, {KV_LEN}))"
        )
    if isinstance(shape, int) or len(shape) == 2:
        B, H = max(B, b + 1), max(H, h + 1)
    # One block of all elements: its picture is that of the elements.
    whole = create_block_mask(mask, B, H, Q_LEN, KV_LEN, device, (max(1, Q_LEN), max(1, KV_LEN)))
    shown = view(whole, b, h, (0, 0) if Q_LEN * KV_LEN else None, _MOST_CELLS)
    cells = shown.blocks if shown.zoom is None else shown.zoom.elements
    share = (cells.full.sum() / cells.things.sum().clamp_min(1)).item()
    ax = _axes() if ax is None else ax
    draw_cells(cells, ax, (1, 1))
    sizes = (f"{name} {i}" for name, i, n in (("batch", b, B), ("head", h, H)) if n > 1)
    ax.set_title(", ".join([name_of(mask), *sizes]) + f"\n{Q_LEN} × {KV_LEN} elements, {100 * share:.4g} % attended")
    return ax


def _axes() -> Any:
    _, axes = import_module("matplotlib.pyplot").subplots(layout="constrained")
    return axes


def _alike(shape: tuple[int, int]) -> bool:
    return max(shape) <= 4 * min(shape)


def _norm(what: str, known: Tensor) -> Any:
    """Values to colours: weights from 0, by their square root, as most of them are small."""
    colors = import_module("matplotlib.colors")
    high = float(known.max()) if known.numel() else 1.0
    if what == "weight":
        return colors.PowerNorm(0.5, 0.0, high or 1.0)
    return colors.Normalize(float(known.min()) if known.numel() else 0.0, high)


def _label(ax: Any, rows: tuple[int, ...], columns: tuple[int, ...]) -> None:
    """Positions along the axes, which need not be adjacent."""
    for axis, name, positions, most in (
        (ax.yaxis, "queries", rows, _MOST_TICKS[0]),
        (ax.xaxis, "keys", columns, _MOST_TICKS[1]),
    ):
        places = ticks(0, len(positions) - 1, 1, most) if positions else []
        axis.set_ticks(places, [str(positions[i]) for i in places])
        axis.set_label_text(name)


def _legend(ax: Any, broken: bool) -> None:
    patches = import_module("matplotlib.patches")
    kinds = [(HIDDEN, "hidden by the mask"), (COLORS[EMPTY], "in a skipped block")]
    kinds += [(NOT_FINITE, "nan or infinite")] if broken else []
    swatches = [patches.Patch(facecolor=color, edgecolor="grey", label=text) for color, text in kinds]
    ax.legend(handles=swatches, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(kinds), frameon=False)
