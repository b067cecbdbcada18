"""Memory layout of results: which order of dimensions an output has in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_like_strides(query: Tensor, last: int) -> Tensor:
    """An uninitialised tensor [B, H, L, last] of the query's dtype, dense, with its dimensions in the query's order.

    A query that is a transposed [B, L, H, E] gives an output that is one too, so merging the heads costs no copy.
    """
    return torch.empty_permuted(
        (*query.shape[:-1], last), order_in_memory(query), dtype=query.dtype, device=query.device
    )


def in_order_of(query: Tensor, out: Tensor) -> Tensor:
    """`out` in the memory layout of `empty_like_strides`."""
    order = order_in_memory(query)
    return out.permute(order).contiguous().permute([order.index(d) for d in range(len(order))])


def order_in_memory(query: Tensor) -> tuple[int, ...]:
    """The dimensions of the query's output, the outermost first; the last one is always the innermost."""
    strides: tuple[int, ...] = query.stride()
    order: list[int] = []
    for d in range(query.dim() - 1):  # not `sorted`: Dynamo cannot sort by symbolic numbers, only compare them
        at = d
        while at > 0 and strides[order[at - 1]] < strides[d]:
            at -= 1
        order.insert(at, d)
    return (*order, query.dim() - 1)
