"""Block lists in the form that kernels read: by query block in ascending order, and by key block.

Made once for a block mask and kept as long as its tensors live and are not written to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..block_lists import adjacent, by_column
from ..templates.arguments import Lists
from .kept import kept
from .recording import step


def by_query(block_mask: Sequence[Tensor], block: int, S: int) -> Lists:
    """The lists of the rows of query blocks. The last key block comes last where, of that size, it reaches beyond `S`."""
    if S % block == 0 or len(block_mask) < 4:
        return _lists(block_mask)
    return _lists((*block_mask[:3], *step(_sorted, block_mask)))


def by_key(block_mask: Sequence[Tensor], columns: int) -> Lists:
    """The lists of the key blocks: which of the query blocks attend to each of the `columns`."""
    return _lists(step(transposed, block_mask, columns))


def contiguous(block_mask: Sequence[Tensor], columns: int, by_key: bool) -> bool:
    """Whether the full blocks of every list are adjacent, in ascending order, and can be counted instead of read.

    Reads the lists: the device is waited for, once.
    """
    return bool(step(_is_contiguous, block_mask, columns, by_key))


def _sorted(block_mask: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return kept("sorted", block_mask, (), lambda: _ascending(block_mask))


def transposed(block_mask: Sequence[Tensor], columns: int) -> tuple[Tensor, ...]:
    """The counts and indices of the key blocks, kept."""
    return kept("transposed", block_mask, (columns,), lambda: _transposed(block_mask, columns))


def _is_contiguous(block_mask: Sequence[Tensor], columns: int, by_key: bool) -> bool:
    if block_mask[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return False

    def found() -> bool:
        lists = _transposed(block_mask, columns) if by_key else block_mask
        return len(lists) < 4 or adjacent(lists[2], lists[3])

    return kept("contiguous", block_mask, (columns, by_key), found)


def _ascending(block_mask: Sequence[Tensor]) -> tuple[Tensor]:
    """The indices of the full blocks, in ascending order. No other list, which would keep itself alive."""
    count, index = block_mask[2], block_mask[3]
    used = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
    return (torch.where(used, index, torch.iinfo(torch.int32).max).sort(-1).values,)


def _transposed(block_mask: Sequence[Tensor], columns: int) -> tuple[Tensor, ...]:
    pairs = zip(block_mask[0::2], block_mask[1::2], strict=True)
    return tuple(t.contiguous() for count, index in pairs for t in by_column(count, index, columns))


def _lists(tensors: Sequence[Tensor]) -> Lists:
    held = [t.to(torch.int32).contiguous() for t in tensors]
    shape = held[0].shape
    full_count, full_index = (held[2], held[3]) if len(held) > 2 else (None, None)
    return Lists(
        partial_count=held[0],
        partial_index=held[1],
        partial_columns=held[1].shape[-1],
        full_count=full_count,
        full_index=full_index,
        full_columns=0 if full_index is None else full_index.shape[-1],
        stride_b=shape[1] * shape[2] if shape[0] > 1 else 0,
        stride_h=shape[2] if shape[1] > 1 else 0,
    )
