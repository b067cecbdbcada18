"""FLOP formulas for `torch.utils.flop_counter`: matrix products over the blocks that are visited, not over L x S."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import ops
from .codegen.private import FakeTensor


def visited_elements(block_mask: Sequence[Tensor], block_size: Sequence[int], B: int, H: int, L: int, S: int) -> int:
    """Score elements in listed blocks, summed over batch and heads; all of them for tensors without data."""
    if not block_mask or isinstance(block_mask[0], FakeTensor) or block_mask[0].is_meta:
        return B * H * L * S
    total = 0
    for count, index in zip(block_mask[0::2], block_mask[1::2], strict=True):
        rows = (L - torch.arange(count.shape[-1], device=count.device) * block_size[0]).clamp(0, block_size[0])
        used = torch.arange(index.shape[-1], device=count.device) < count.unsqueeze(-1)
        columns = (S - index * block_size[1]).clamp(0, block_size[1]) * used
        area = (columns.sum(-1) * rows).sum((-1,))
        total += int(area.expand(B, H).sum())
    return total


def _sizes(query: Tensor, key: Tensor, block_mask: Sequence[Tensor], block_size: Sequence[int]) -> int:
    B, H, L, _ = query.shape
    return visited_elements(block_mask, block_size, B, H, L, key.shape[2])


@register_flop_formula(ops.FORWARD.overloadpacket, get_raw=True)  # type: ignore[untyped-decorator]
def forward_flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: Any,
    block_mask: Sequence[Tensor],
    ints: Any,
    floats: Any,
    block_size: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    """Two products: Q K^T and P V."""
    return 2 * _sizes(query, key, block_mask, block_size) * (query.shape[-1] + value.shape[-1])


@register_flop_formula(ops.BACKWARD.overloadpacket, get_raw=True)  # type: ignore[untyped-decorator]
def backward_flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Any,
    lse: Any,
    dout: Any,
    dlse: Any,
    captured: Any,
    block_mask: Sequence[Tensor],
    ints: Any,
    floats: Any,
    block_size: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    """Five products: Q K^T, dO V^T, P^T dO, dS K and dS^T Q."""
    return 2 * _sizes(query, key, block_mask, block_size) * (3 * query.shape[-1] + 2 * value.shape[-1])
