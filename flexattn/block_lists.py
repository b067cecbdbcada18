"""Block lists: counts [B, H, rows] and indices [B, H, rows, columns] of the blocks of each row; checks and selections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .codegen.private import transforms_are_active
from .codegen.tile_lists import Segments, lists_of

_DENSE = 1 << 20  # blocks of which an array costs less than to wait for a device


def dense(count: Tensor, index: Tensor, columns: int) -> Tensor:
    """[B, H, rows, columns] bool: which blocks are listed. What lies past a row's count means nothing."""
    found = torch.zeros(*count.shape, columns + 1, dtype=torch.bool, device=count.device)
    used = torch.arange(index.shape[-1], device=count.device) < count.unsqueeze(-1)
    return found.scatter_(-1, torch.where(used, index, columns).long(), True)[..., :columns]


def by_column(count: Tensor, index: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The lists of the columns: how many rows list each, [B, H, columns], and which, [B, H, columns, rows], int32.

    For long sequences, in eager code, as narrow as the longest allows and made without an array of all blocks.
    """
    B, H, rows = count.shape
    fixed = (
        torch.compiler.is_compiling()
        or transforms_are_active()
        or (count.is_cuda and torch.cuda.is_current_stream_capturing())
    )
    if fixed or count.numel() * columns <= _DENSE:
        listed = dense(count, index, columns).mT
        order = torch.argsort(listed.int(), dim=-1, descending=True, stable=True).to(torch.int32)
        return listed.sum(-1, dtype=torch.int32), order
    used = torch.arange(index.shape[-1], device=count.device) < count.unsqueeze(-1)
    b, h, row, place = used.nonzero().unbind(-1)
    segments = Segments((b * H + h) * columns + index[b, h, row, place], row, row + 1)
    made = lists_of(segments, B * H * columns, rows, trim=True)
    return made.counts.view(B, H, columns), made.indices.view(B, H, columns, -1)


def adjacent(count: Tensor, index: Tensor) -> bool:
    """Whether every row lists adjacent blocks in ascending order."""
    place = torch.arange(index.shape[-1], device=index.device)
    return not index.shape[-1] or bool(((index - index[..., :1] == place) | (place >= count.unsqueeze(-1))).all())


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
        picked = range(size)[item]  # and not item.indices(size), which Dynamo of PyTorch 2.11 does not know
        if picked.step < 0:
            return torch.arange(picked.start, picked.stop, picked.step)
        return slice(picked.start, max(picked.start, picked.stop), picked.step)
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


def has_data(t: Tensor) -> bool:
    """Whether a tensor can be looked at: not one of a trace or a transform, nor on the meta device."""
    if torch.compiler.is_compiling() or transforms_are_active():
        return False
    return type(t) in (Tensor, torch.nn.Parameter) and not t.is_meta


def visited_elements(lists: Sequence[Tensor], lengths: tuple[int, int], size: tuple[int, int]) -> float:
    """How many elements lie in the blocks of lists, counts and indices in turn; blocks at the ends may be short."""
    starts = torch.arange(0, lengths[0], size[0], device=lists[0].device)
    rows, columns = (lengths[0] - starts).clamp_max(size[0]).double(), -(-lengths[1] // size[1])
    missing = columns * size[1] - lengths[1]
    total = 0.0
    for count, index in zip(lists[0::2], lists[1::2], strict=True):
        used = torch.arange(index.shape[-1], device=count.device) < count.unsqueeze(-1)
        ends = (used & (index == columns - 1)).sum(-1)
        total += float(((count.double() * size[1] - ends.double() * missing) * rows).sum())
    return total


def checked_lengths(
    pairs: Sequence[tuple[str, Tensor, Tensor]], size: tuple[int, int], seq_lengths: tuple[int, int] | None
) -> tuple[int, int]:
    """(Q_LEN, KV_LEN) of lists, each with the name of its kind. Raises `ValueError` for what does not fit together."""
    _check_shapes(pairs)
    if seq_lengths is not None and (len(seq_lengths) != 2 or any(isinstance(n, int) and n < 0 for n in seq_lengths)):
        raise ValueError(f"seq_lengths is {seq_lengths}; it must be two lengths, (Q_LEN, KV_LEN)")
    rows, columns = pairs[0][2].shape[2], max(index.shape[3] for _, _, index in pairs)
    lengths = (rows * size[0], columns * size[1]) if seq_lengths is None else (seq_lengths[0], seq_lengths[1])
    if -(-lengths[0] // size[0]) != rows:
        raise ValueError(
            f"Q_LEN {lengths[0]} has {-(-lengths[0] // size[0])} blocks of {size[0]}, the lists have {rows} rows"
        )
    return lengths


def _check_shapes(pairs: Sequence[tuple[str, Tensor, Tensor]]) -> None:
    for name, count, index in pairs:
        if count.dim() != 3 or index.dim() != 4 or index.shape[:3] != count.shape:
            raise ValueError(
                f"{name}_num_blocks has shape {tuple(count.shape)} and {name}_indices {tuple(index.shape)}; "
                "they must be [B, H, rows] and [B, H, rows, columns]"
            )
        if any(t.dtype is torch.bool or t.is_floating_point() or t.is_complex() for t in (count, index)):
            raise ValueError(
                f"{name}_num_blocks is {count.dtype} and {name}_indices {index.dtype}; both must be integers, "
                "e.g. t.to(torch.int32)"
            )
        if count.shape != pairs[0][1].shape:
            raise ValueError(f"full blocks have rows {tuple(count.shape)}, partial blocks {tuple(pairs[0][1].shape)}")


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
                f"row {row} (batch {b}, head {h}) lists key block {int(index[b, h, row, i])}; there are {columns} key blocks. "
                "Lists that are narrower than the mask need seq_lengths=(Q_LEN, KV_LEN)"
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
