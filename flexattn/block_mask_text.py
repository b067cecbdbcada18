"""Pictures of a block mask in characters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .block_mask import BlockMask

_ALL, _SOME, _NONE = "█", "░", " "


def picture(mask: BlockMask, grid_size: int | tuple[int, int], limit: int) -> str:
    """See `BlockMask.to_string`."""
    dense = mask.to_dense().cpu()
    parts = []
    pairs = [(b, h) for b in range(dense.shape[0]) for h in range(dense.shape[1])]
    for b, h in pairs[:limit]:
        title = f"(batch {b}, head {h})\n" if len(pairs) > 1 else ""
        parts.append(title + _draw(dense[b, h], grid_size))
    if len(pairs) > limit:
        parts.append(f"... and {len(pairs) - limit} more")
    return "\n".join(parts)


def _draw(blocks: Tensor, grid_size: int | tuple[int, int]) -> str:
    sides = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    edges = []
    for n, side in zip(blocks.shape, sides, strict=True):
        cells = n if side == -1 else min(n, side)
        edges.append([n * i // max(cells, 1) for i in range(cells + 1)])
    lines = []
    for top, bottom in zip(edges[0], edges[0][1:], strict=False):
        line = ""
        for left, right in zip(edges[1], edges[1][1:], strict=False):
            share = blocks[top:bottom, left:right].to(torch.float32).mean().item()
            line += (_ALL if share == 1 else _SOME if share > 0 else _NONE) * 2
        lines.append(line)
    return "\n".join(lines)
