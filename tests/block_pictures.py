"""What a picture of a block mask should show, from the dense mask and with plain loops; masks to draw."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import hypothesis.strategies as st
import torch
from torch import Tensor

from flexattn import BlockMask, create_block_mask, create_mask, masks
from flexattn.block_mask_cells import EMPTY, FULL, PALEST, PARTIAL
from flexattn.testing.strategies import mask_mods


class Painted(NamedTuple):
    """What there is to see at each element: [queries, keys] kinds, and opacities."""

    kind: Tensor
    opacity: Tensor


def true_kinds(dense: Tensor, block: tuple[int, int]) -> Tensor:
    """[rows, columns] kinds of the blocks of a dense mask [Q, KV]."""
    return torch.tensor(
        [
            [FULL if bool(tile.all()) else PARTIAL if bool(tile.any()) else EMPTY for tile in band.split(block[1], 1)]
            for band in dense.split(block[0], 0)
        ]
    ).view(-(-dense.shape[0] // block[0]), -(-dense.shape[1] // block[1]))


def cut(things: int, most: int) -> list[int]:
    cells = min(things, most)
    return [things * i // cells for i in range(cells + 1)]


def true_cells(kinds: Tensor, most: int, size: tuple[int, int], lengths: tuple[int, int]) -> Painted:
    """What is to be seen of blocks of `size` elements in at most so many cells a side: in elements, with a plain loop."""
    kind, opacity = torch.zeros(lengths, dtype=torch.int64), torch.zeros(lengths, dtype=torch.float64)
    rows, columns = (cut(n, most) for n in kinds.shape)
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            cell = kinds[top:bottom, left:right]
            partial, full = int((cell == PARTIAL).sum()), int((cell == FULL).sum())
            place = slice(top * size[0], bottom * size[0]), slice(left * size[1], right * size[1])
            if partial + full:
                kind[place] = FULL if full > partial else PARTIAL
                opacity[place] = round(PALEST + (1 - PALEST) * (partial + full) / cell.numel(), 2)
    return Painted(kind, opacity)


class Drawn(NamedTuple):
    """A mask, one batch entry and head of it, and its dense values."""

    mask: BlockMask
    batch: int
    head: int
    dense: Tensor
    block: tuple[int, int]


@st.composite
def drawings(draw: st.DrawFn) -> Drawn:
    mod = draw(mask_mods())
    Q, KV = draw(st.integers(1, 100)), draw(st.integers(1, 100))
    block = draw(st.sampled_from([(16, 16), (8, 32), (7, 5), (128, 128), (1, 3)]))
    batch, head = draw(st.integers(0, 1)), draw(st.integers(0, 3))
    mask = create_block_mask(mod, 2, 4, Q, KV, "cpu", block, separate_full_blocks=draw(st.booleans()))
    dense = create_mask(mod, 2, 4, Q, KV, "cpu")[batch, head]
    return Drawn(mask, batch, head, dense, block)


def kinds_of(d: Drawn) -> Tensor:
    """Kinds as listed: without lists of full blocks, a full one is listed as partial."""
    kinds = true_kinds(d.dense, d.block)
    return kinds.clamp_max(PARTIAL) if d.mask.full_kv_num_blocks is None else kinds


def causal(n: int, block: int, **options: Any) -> BlockMask:
    return create_block_mask(masks.causal_mask, None, None, n, n, "cpu", block, **options)


def by_head(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 10 * (h + 1) + 40 * b)
