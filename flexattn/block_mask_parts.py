"""Parts of a block mask: some batch entries, heads and rows of query blocks, or its upper left corner."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .block_lists import last, positions, take
from .shifted_mask import ShiftedMask

if TYPE_CHECKING:
    from .block_mask import BlockMask


def part(mask: BlockMask, index: Any) -> BlockMask:
    """See `BlockMask.__getitem__`."""
    items = index if isinstance(index, tuple) else (index,)
    if len(items) > 3:
        raise IndexError(
            f"a block mask has 3 dimensions to index (batch, heads, rows of query blocks), got {len(items)}"
        )
    held = mask.kv_num_blocks.shape
    sizes = (*mask.sizes, held[2])
    picks = [positions(i, n, d) for d, (i, n) in enumerate(zip(items, sizes, strict=False))]
    picks += [slice(0, n, 1) for n in sizes[len(picks) :]]
    counts = [len(p) if isinstance(p, Tensor) else len(range(p.start, p.stop, p.step)) for p in picks]
    # What is the same for all is kept once, however many are picked.
    once = [d < 2 and held[d] == 1 and counts[d] > 0 for d in range(3)]
    made = mask._map(partial(take, picks=[slice(0, 1, 1) if o else p for o, p in zip(once, picks, strict=True)]))
    made._sizes = (counts[0], counts[1])
    rows, block = picks[2], mask.BLOCK_SIZE[0]
    count, length = made.kv_num_blocks.shape[2], mask.seq_lengths[0]
    ends_short = length % block and count and last(rows) == sizes[2] - 1
    made.seq_lengths = (count * block - (block - length % block if ends_short else 0), mask.seq_lengths[1])
    if length % block and not isinstance(rows, slice) and bool((rows[:-1] == sizes[2] - 1).any()):
        raise IndexError("the last row of query blocks is shorter than a block, so it can only be the last one picked")
    shifts = [None if held[d] == 1 else picks[d] for d in (0, 1)] + [rows]
    # Here and not at every call of the mask: its maps, where the lists are and in the dtype of an index.
    shifts = [p.to(mask.device, torch.int32) if isinstance(p, Tensor) else p for p in shifts]
    made.mask_mod = ShiftedMask.of(mask.mask_mod, shifts[0], shifts[1], shifts[2], block)
    made._described = made.mask_mod if mask.is_exact else None
    return made


def cropped(mask: BlockMask, new_q_len: int, new_kv_len: int) -> BlockMask:
    """See `BlockMask._adjust`."""
    if new_q_len > mask.seq_lengths[0] or new_kv_len > mask.seq_lengths[1]:
        raise ValueError(
            f"a block mask for {mask.seq_lengths} cannot be extended to {(new_q_len, new_kv_len)}; create it anew"
        )
    rows, columns = -(-new_q_len // mask.BLOCK_SIZE[0]), -(-new_kv_len // mask.BLOCK_SIZE[1])
    made = mask._map(lambda t: t[:, :, :rows])
    for kind in ("kv", "full_kv"):
        count, index = getattr(made, f"{kind}_num_blocks"), getattr(made, f"{kind}_indices")
        if count is None:
            continue
        kept = (torch.arange(index.shape[-1], device=mask.device) < count.unsqueeze(-1)) & (index < columns)
        order = torch.argsort(kept.int(), dim=-1, descending=True, stable=True)[..., : max(columns, 0)]
        setattr(made, f"{kind}_indices", index.gather(-1, order))
        setattr(made, f"{kind}_num_blocks", kept.sum(-1, dtype=torch.int32))
    made.seq_lengths = (new_q_len, new_kv_len)
    return made
