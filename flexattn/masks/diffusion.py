"""The mask of block diffusion: a noisy and a clean copy of a sequence, trained in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..mask_object import MaskObject
from .parameters import check_size


@dataclass(frozen=True, eq=False, repr=False)
class block_diffusion(MaskObject):
    """A noisy copy of a sequence followed by the clean one, both in blocks of `block` tokens.

    Tokens 0 to length - 1 are noisy (x_t), the next `length` the clean ones (x_0). A noisy token sees the noisy tokens of
    its block and the clean ones of earlier blocks; a clean token the clean ones of its block and earlier ones. With
    length 4 and block 2 (noisy, then clean):

        1 1 . . . . . .
        1 1 . . . . . .
        . . 1 1 1 1 . .
        . . 1 1 1 1 . .
        . . . . 1 1 . .
        . . . . 1 1 . .
        . . . . 1 1 1 1
        . . . . 1 1 1 1

    Both copies have the same positions, so positional encodings repeat: token i and token length + i. A last block may be
    shorter. Sampling needs the clean half alone: `q_idx // block >= kv_idx // block`.

    Args:
        length: tokens of one copy; Q_LEN = KV_LEN = 2 * length.
        block: tokens of a block, at least 1.

    Raises:
        ValueError: for numbers below 1, or no ints.

    Source: Arriola et al., 2025 (Block Diffusion, BD3-LM), section 3; the order, noisy first, is that of its code.

    Example:
        >>> import flexattn
        >>> flexattn.create_mask(flexattn.masks.block_diffusion(2, 1), None, None, 4, 4)[0, 0].int().tolist()
        [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """

    length: int
    block: int

    def __post_init__(self) -> None:
        check_size("length", self.length, 1, "It counts the tokens of one copy, half of the sequence")
        check_size("block", self.block, 1, "A block has at least one token")

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        noisy_query, noisy_key = q_idx < self.length, kv_idx < self.length
        query = torch.where(noisy_query, q_idx, q_idx - self.length) // self.block
        key = torch.where(noisy_key, kv_idx, kv_idx - self.length) // self.block
        same_copy = (noisy_query & noisy_key) | (~noisy_query & ~noisy_key)
        return (same_copy & (query == key)) | (~noisy_key & (query > key))
