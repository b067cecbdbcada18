"""Where two masks differ, in characters: the elements around the first difference, and a map of long masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..block_mask_cells import gathered_blocks
from .search import Element, Found
from .traced_mask import Shape, TracedMask

_ROWS, _COLUMNS = 12, 24  # elements, or cells of the map
_SIGNS = ".AB1"
_MEANING = "1 both attend   . neither\nA only A        B only B"
_CELLS = ".+#"  # nowhere, in some blocks, in all elements


def picture_of(masks: Sequence[TracedMask], found: Found, shape: Shape) -> str:
    """The picture of a difference that was found between masks A and B, up to 40 columns wide."""
    assert found.first is not None
    parts = [drawn(masks, found.first, shape, _SIGNS, _MEANING)]
    if shape[2] > _ROWS or shape[3] > _COLUMNS:
        parts += ["", _map(found, shape)]
    return "\n".join(parts)


def drawn(masks: Sequence[TracedMask], at: Element, shape: Shape, signs: str, meaning: str) -> str:
    """The elements of two masks around one of them. `signs`: for neither, the first alone, the second alone, both."""
    (q, q_stop), (kv, kv_stop) = _around(at.q_idx, _ROWS, shape[2]), _around(at.kv_idx, _COLUMNS, shape[3])
    q_idx, kv_idx = torch.arange(q, q_stop).view(-1, 1), torch.arange(kv, kv_stop)
    first, second = (mask.values(at.b, at.h, q_idx, kv_idx).int().cpu() for mask in masks)
    width = len(str(q_stop - 1))
    lines = [f"kv_idx {kv} to {kv_stop - 1}"]
    for row, kinds in enumerate((first + 2 * second).tolist(), start=q):
        mark = ">" if row == at.q_idx else " "
        lines.append(f"{mark} q_idx {row:{width}}  " + "".join(signs[kind] for kind in kinds))
    return "\n".join([*lines, meaning])


def _around(place: int, size: int, length: int) -> tuple[int, int]:
    start = max(0, min(place - size // 2, length - size))
    return start, min(start + size, length)


def _map(found: Found, shape: Shape) -> str:
    assert found.first is not None and found.blocks is not None
    cells, _ = gathered_blocks(found.blocks, found.first.b, found.first.h, (_ROWS, _COLUMNS))
    levels = (cells.visited > 0).int() + (cells.full == cells.things).int()
    each = (-(-n // (len(edges) - 1)) for n, edges in zip(shape[2:], (cells.q_edges, cells.kv_edges), strict=True))
    lines = [f"all of b={found.first.b}, h={found.first.h}", "in cells of about {} x {}".format(*each)]
    lines += ["  " + "".join(_CELLS[n] for n in row) for row in levels.tolist()]
    return "\n".join([*lines, ". equal   + differ in part", "# differ in every element"])
