"""Memory layout of results: which order of dimensions an output has in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_like_strides(query: Tensor, last: int) -> Tensor:
    """An uninitialised tensor [B, H, L, last] of the query's dtype, dense, with its dimensions in the query's order.

    A query that is a transposed [B, L, H, E] gives an output that is one too, so merging the heads costs no copy.
    """
    shape = (*query.shape[:-1], last)
    return torch.empty_permuted(shape, order_in_memory(query), dtype=query.dtype, device=query.device)


def order_in_memory(query: Tensor) -> list[int]:
    """The dimensions of the query's output, the outermost first."""
    strides: tuple[int, ...] = query.stride()
    return [*sorted(range(query.dim() - 1), key=lambda d: (-strides[d], d)), query.dim() - 1]
