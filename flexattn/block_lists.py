"""Block lists: counts [B, H, rows] and indices [B, H, rows, columns] of the blocks of each row; checks and selections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def dense(count: Tensor, index: Tensor, columns: int) -> Tensor:
    """[B, H, rows, columns] bool: which blocks are listed. What lies past a row's count means nothing."""
    found = torch.zeros(*count.shape, columns + 1, dtype=torch.bool, device=count.device)
    used = torch.arange(index.shape[-1], device=count.device) < count.unsqueeze(-1)
    return found.scatter_(-1, torch.where(used, index, columns).long(), True)[..., :columns]


def take(lists: Tensor, picks: Sequence[slice | Tensor]) -> Tensor:
    """Some batch entries, heads and rows of a list, contiguous."""
    for dim, pick in enumerate(picks):
        lists = lists[(slice(None),) * dim + (pick,)]
    return lists.contiguous()


def last(pick: slice | Tensor) -> int:
    """The last position of a pick that is not empty."""
    if isinstance(pick, slice):
        return range(pick.start, pick.stop, pick.step or 1)[-1]
    return int(pick[-1])


def positions(item: Any, size: int, dim: int) -> slice | Tensor:
    """An index of one dimension, as a slice with known ends or a tensor of non-negative positions."""
    what = ("batch", "heads", "rows of query blocks")[dim]
    if isinstance(item, slice):
        start, stop, step = item.indices(size)
        if step < 0:
            return torch.arange(start, stop, step)
        return slice(start, max(start, stop), step)
    if isinstance(item, int) and not isinstance(item, bool):
        if not -size <= item < size:
            raise IndexError(f"index {item} is out of range for {what} of size {size}")
        return slice(item % size, item % size + 1, 1)
    if isinstance(item, (list, tuple)):
        item = torch.tensor(item)
    if isinstance(item, Tensor) and not item.is_floating_point() and item.dtype is not torch.bool and item.dim() <= 1:
        item = item.reshape(-1).long()
        if item.numel() and not bool(((item >= -size) & (item < size)).all()):
            raise IndexError(f"indices {item.tolist()} are out of range for {what} of size {size}")
        return torch.where(item < 0, item + size, item)
    raise IndexError(f"{what} cannot be indexed with {item!r}; use an int, a slice or a 1-d tensor of positions")


def block_size(size: Any) -> tuple[int, int]:
    """(queries, keys) of a block, from an int or a pair."""
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"BLOCK_SIZE is {size!r}; it must be a positive int or a pair of them, (queries, keys)")
    return pair[0], pair[1]


def check_lists(lists: Sequence[Tensor], columns: int) -> None:
    """Raise `ValueError` for a row that lists a block twice or outside the mask."""
    seen = []
    for count, index in zip(lists[0::2], lists[1::2], strict=True):
        if bool(((count < 0) | (count > index.shape[-1])).any()):
            raise ValueError(
                f"a row counts between 0 and {index.shape[-1]} blocks, the width of its list; got {count.tolist()}"
            )
        used = torch.arange(index.shape[-1], device=count.device) < count.unsqueeze(-1)
        wrong = used & ((index < 0) | (index >= columns))
        if bool(wrong.any()):
            b, h, row, i = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"row {row} (batch {b}, head {h}) lists key block {int(index[b, h, row, i])}; there are {columns} key blocks"
            )
        seen.append(torch.where(used, index, columns + torch.arange(index.shape[-1], device=count.device)))
    offset = seen[0].shape[-1]
    joined = torch.cat([s if i == 0 else torch.where(s >= columns, s + offset, s) for i, s in enumerate(seen)], -1)
    joined = joined.sort(-1).values
    twice = (joined[..., 1:] == joined[..., :-1]).nonzero()
    if len(twice):
        b, h, row, i = twice[0].tolist()
        raise ValueError(
            f"row {row} (batch {b}, head {h}) lists key block {int(joined[b, h, row, i])} twice; a block is partial, full or "
            "not listed"
        )
