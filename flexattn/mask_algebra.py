"""Masks made of block masks: intersection, union, complement, and the mask seen from an offset.

Each is built anew from a mask function, which costs as little as building any other, so its lists are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .block_lists import has_data
from .block_mask import BlockMask
from .create import create_block_mask
from .mask_object import MaskMod, MaskObject, name_of
from .masks import and_masks, not_mask, or_masks


@dataclass(frozen=True, eq=False, repr=False)
class ListedMask(MaskObject):
    """What a block mask attends to whose lists say more than its `mask_mod`: full blocks whole, partial ones by the mask.

    `kinds` [B, H, rows, columns] int8: 0 empty, 1 partial, 2 full. `block`: (queries, keys) of a block.
    """

    kinds: Tensor
    block: tuple[int, int]
    mask: MaskMod

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """Attended or not."""
        place = (0 if self.kinds.shape[0] == 1 else b), (0 if self.kinds.shape[1] == 1 else h)
        kind = self.kinds[place[0], place[1], q_idx // self.block[0], kv_idx // self.block[1]]
        return (kind == 2) | ((kind == 1) & self.mask(b, h, q_idx, kv_idx))

    def __repr__(self) -> str:
        return f"listed({name_of(self.mask)})"


@dataclass(frozen=True, eq=False, repr=False)
class OffsetMask(MaskObject):
    """A mask whose first query is at position `q` and whose first key is at position `kv` of another mask."""

    mask: MaskMod
    q: int | Tensor
    kv: int | Tensor

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The other mask at the shifted positions."""
        return self.mask(b, h, _moved(q_idx, self.q, b), _moved(kv_idx, self.kv, b))


def _moved(index: Tensor, by: int | Tensor, b: Tensor) -> Tensor:
    if not isinstance(by, Tensor):
        return index + by if by else index
    return index + (by[b] if by.dim() else by).to(torch.int32)


def whole_mask_mod(mask: BlockMask) -> MaskMod:
    """A mask function that by itself says what `mask` attends to."""
    if mask.is_exact:
        return mask.mask_mod
    lists = mask.kv_lists()
    kinds = mask._dense(lists[0], lists[1]).to(torch.int8)
    if len(lists) > 2:
        kinds = torch.where(mask._dense(lists[2], lists[3]), 2, kinds).to(torch.int8)
    return ListedMask(kinds, mask.BLOCK_SIZE, mask.mask_mod)


def _made(mask_mod: MaskMod, sizes: tuple[int, int], lengths: tuple[int, int], like: BlockMask) -> BlockMask:
    return create_block_mask(mask_mod, *sizes, *lengths, device=like.device, BLOCK_SIZE=like.BLOCK_SIZE)


def combine(operator: str, a: BlockMask, b: BlockMask) -> BlockMask:
    """`a & b` or `a | b`."""
    for what, one, two in (
        ("lengths (Q_LEN, KV_LEN)", a.seq_lengths, b.seq_lengths),
        ("block sizes", a.BLOCK_SIZE, b.BLOCK_SIZE),
        ("devices", a.device, b.device),
    ):
        if one != two:
            raise ValueError(
                f"block masks of different {what}, {one} and {two}, cannot be combined. Combine their mask functions "
                f"with {'and_masks' if operator == '&' else 'or_masks'} and build one block mask"
            )
    sizes = []
    for name, n, m in zip("BH", a.sizes, b.sizes, strict=True):
        if n != m and 1 not in (n, m):
            raise ValueError(
                f"block masks with {name} = {n} and {name} = {m} cannot be combined; {name} must agree or be 1"
            )
        sizes.append(max(n, m))
    join = and_masks if operator == "&" else or_masks
    return _made(join(whole_mask_mod(a), whole_mask_mod(b)), (sizes[0], sizes[1]), a.seq_lengths, a)


def complement(mask: BlockMask) -> BlockMask:
    """`~mask`."""
    return _made(not_mask(whole_mask_mod(mask)), mask.sizes, mask.seq_lengths, mask)


def offset(mask: BlockMask, q: Any, kv: Any, Q_LEN: int | None, KV_LEN: int | None) -> BlockMask:
    """See `BlockMask.offset`."""
    lengths, B = [], mask.sizes[0]
    for name, by, given, length in zip(("q", "kv"), (q, kv), (Q_LEN, KV_LEN), mask.seq_lengths, strict=True):
        moves = by if isinstance(by, Tensor) else torch.tensor(by)
        furthest = int(moves.max()) if has_data(moves) and moves.numel() else 0 if isinstance(by, Tensor) else by
        if moves.is_floating_point() or moves.dtype is torch.bool or moves.dim() > 1:
            raise ValueError(f"offset({name}={by!r}): an offset is an int, or an integer tensor: 0-d, or [B]")
        if (has_data(moves) and moves.numel() and bool((moves < 0).any())) or furthest < 0:
            raise ValueError(
                f"offset({name}={by}): an offset is 0 or more, a position in the mask it is an offset into"
            )
        if given is None and isinstance(by, Tensor):
            raise ValueError(f"offset({name}=tensor) needs {name.upper()}_LEN, the length of the mask it makes")
        if moves.dim() == 1:  # another mask for each batch entry
            if B != 1 and B != len(moves):  # not `in`, see validate.block_mask
                raise ValueError(f"offset({name}=...) has {len(moves)} entries, the mask has B = {B}")
            B = len(moves)
        lengths.append(max(0, length - by) if given is None else given)
        if not mask.is_exact and furthest + lengths[-1] > length:
            raise ValueError(
                f"offset({name}=...) reaches position {furthest + lengths[-1]} of a mask for {length}, whose lists "
                "say nothing of it. Build the mask with create_block_mask, from a function that does"
            )
    sizes = (B, mask.sizes[1])
    return _made(OffsetMask(whole_mask_mod(mask), q, kv), sizes, (lengths[0], lengths[1]), mask)
