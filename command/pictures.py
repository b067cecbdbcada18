"""A mask in characters: its blocks by kind, and the elements of a small one."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flexattn.block_mask import BlockMask
from flexattn.block_mask_cells import Cells, gathered_blocks
from flexattn.create import create_mask
from flexattn.mask_algebra import whole_mask_mod

FULL, PARTIAL, EMPTY = "█", "▒", "·"
ROWS = 32  # of a picture, at most
_PER_CELL = 2  # characters


class Blocks(NamedTuple):
    """How many blocks of one batch entry and head are of each kind."""

    full: int
    partial: int
    empty: int


def cells(mask: BlockMask, batch: int, head: int, width: int) -> Cells:
    """The blocks of one batch entry and head, gathered so that no line of their picture is longer than `width`."""
    return gathered_blocks(mask, batch, head, (ROWS, min(ROWS, width // _PER_CELL)))[0]


def counts(blocks: Cells) -> Blocks:
    """How many there are of each kind."""
    full, partial, things = (int(t.sum()) for t in (blocks.full, blocks.partial, blocks.things))
    return Blocks(full, partial, things - full - partial)


def block_picture(blocks: Cells) -> str:
    """`█` where all of a cell's blocks are full, `·` where all are empty, else `▒`."""
    signs = torch.where(blocks.full == blocks.things, 2, (blocks.visited > 0).long())
    return _drawn(signs, EMPTY + PARTIAL + FULL)


def elements(mask: BlockMask, batch: int, head: int, width: int) -> torch.Tensor | None:
    """[Q_LEN, KV_LEN] bool: what is attended, or None for a mask that is too large to draw."""
    Q_LEN, KV_LEN = mask.seq_lengths
    if Q_LEN > ROWS or KV_LEN * _PER_CELL > width:
        return None
    B, H = mask.sizes
    keep = create_mask(whole_mask_mod(mask), B, H, Q_LEN, KV_LEN, mask.device)
    return keep[batch if B > 1 else 0, head if H > 1 else 0].cpu()


def element_picture(keep: torch.Tensor) -> str:
    """A row a query, a column a key: 1 where it is attended."""
    return _drawn(keep.long(), ".1")


def _drawn(signs: torch.Tensor, characters: str) -> str:
    return "\n".join(" ".join(characters[sign] for sign in row) for row in signs.tolist())
