"""Pictures of a block mask in characters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .block_mask_cells import Cells, gathered_blocks

if TYPE_CHECKING:
    from .block_mask import BlockMask

_NONE, _SOME, _ALL = " ", "░", "█"


def picture(mask: BlockMask, grid_size: int | tuple[int, int], limit: int) -> str:
    """See `BlockMask.to_string`."""
    sides = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    if any(side < -1 for side in sides):
        raise ValueError(f"grid_size is {grid_size}; a side has so many characters, or -1 for one a block")
    batch, heads = mask.kv_num_blocks.shape[:2]
    pairs = [(b, h) for b in range(batch) for h in range(heads)]
    parts = []
    for b, h in pairs[:limit]:
        title = f"(batch {b}, head {h})\n" if len(pairs) > 1 else ""
        parts.append(title + _draw(gathered_blocks(mask, b, h, sides)[0]))
    if len(pairs) > limit:
        parts.append(f"... and {len(pairs) - limit} more")
    return "\n".join(parts)


def _draw(cells: Cells) -> str:
    signs = (_NONE * 2, _SOME * 2, _ALL * 2)
    levels = (cells.visited > 0).int() + (cells.visited == cells.things).int()
    return "\n".join("".join(signs[level] for level in row) for row in levels.tolist())
