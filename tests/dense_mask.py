"""What a block mask attends to, element by element, by the definition of its lists."""

from __future__ import annotations

from torch import Tensor

from flexattn import BlockMask, create_mask
from flexattn.block_lists import dense


def dense_of(mask: BlockMask) -> Tensor:
    """What a mask attends to, [B, H, Q, KV], by the definition of its lists."""
    (B, H), (Q, KV) = mask.sizes, mask.seq_lengths

    def spread(count: Tensor, index: Tensor) -> Tensor:
        blocks = dense(count, index, -(-KV // mask.BLOCK_SIZE[1])).expand(B, H, -1, -1)
        return blocks.repeat_interleave(mask.BLOCK_SIZE[0], 2).repeat_interleave(mask.BLOCK_SIZE[1], 3)[..., :Q, :KV]

    kept = create_mask(mask.mask_mod, B, H, Q, KV, "cpu") & spread(mask.kv_num_blocks, mask.kv_indices)
    if mask.full_kv_num_blocks is None or mask.full_kv_indices is None:
        return kept
    return kept | spread(mask.full_kv_num_blocks, mask.full_kv_indices)
