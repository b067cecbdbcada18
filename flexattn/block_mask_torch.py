"""Block masks of PyTorch: from them, and to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask

from .codegen.private import is_mask_of_a_slice
from .mask_object import MaskMod

if TYPE_CHECKING:
    from .block_mask import BlockMask


def from_torch(cls: type[BlockMask], block_mask: Any) -> BlockMask:
    """See `BlockMask.from_torch`."""
    if not isinstance(block_mask, TorchBlockMask):
        given = f"{type(block_mask).__module__}.{type(block_mask).__name__}"
        hint = "; it needs no conversion" if isinstance(block_mask, cls) else ""
        raise TypeError(f"from_torch takes a torch.nn.attention.flex_attention.BlockMask, got a {given}{hint}")
    if is_mask_of_a_slice(block_mask.mask_mod):
        raise ValueError(
            "this is a slice of a PyTorch BlockMask, which has no mask_mod any more. Convert the whole mask and slice that: "
            "flexattn.BlockMask.from_torch(block_mask)[:, :, rows]"
        )
    return cls.from_kv_blocks(
        block_mask.kv_num_blocks,
        block_mask.kv_indices,
        block_mask.full_kv_num_blocks,
        block_mask.full_kv_indices,
        block_mask.BLOCK_SIZE,
        block_mask.mask_mod,
        block_mask.seq_lengths,
    )


def to_torch(mask: BlockMask, mask_mod: MaskMod) -> TorchBlockMask:
    """See `BlockMask.to_torch`. `mask_mod`: a function that by itself says what `mask` attends to."""
    rows, columns = mask._grid()
    lists: dict[str, Any] = {}
    for kind in ("kv", "full_kv", "q", "full_q"):
        count, index = getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")
        lists[f"{kind}_num_blocks"] = count
        lists[f"{kind}_indices"] = None if count is None else _widened(count, index, rows if "q" in kind else columns)
    return TorchBlockMask(
        seq_lengths=mask.seq_lengths,
        **lists,
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=mask_mod,
    )


def _widened(count: Tensor, index: Tensor, width: int) -> Tensor:
    """Lists of this width. Past the count they hold 0: PyTorch's kernels may read an entry ahead."""
    index = index[..., :width]
    used = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
    return torch.nn.functional.pad(torch.where(used, index, 0), (0, width - index.shape[-1]))
