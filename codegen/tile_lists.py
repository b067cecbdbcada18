"""Block lists from segments: runs of adjacent blocks in rows of blocks. No array of all blocks is made for short rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_WIDTH = 16  # lists are a multiple of this wide, so that few widths occur and kernels are not compiled for each
_EXPANDED = 1 << 20  # listed blocks written at once


class Segments(NamedTuple):
    """Runs of blocks, int64 [N]: the row of blocks, the first column, the column after the last."""

    row: Tensor
    start: Tensor
    stop: Tensor

    def nonempty(self) -> Segments:
        """Those that have a block."""
        keep = self.stop > self.start
        return Segments(*(t[keep] for t in self))


class Lists(NamedTuple):
    """Counts [rows] and indices [rows, columns], int32, of the blocks of each row."""

    counts: Tensor
    indices: Tensor


def joined(parts: Sequence[Segments], device: torch.device) -> Segments:
    """Several sets of segments as one."""
    if not parts:
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        return Segments(empty, empty, empty)
    return Segments(*(torch.cat(t) for t in zip(*parts, strict=True)))


def lists_of(segments: Segments, rows: int, columns: int, trim: bool) -> Lists:
    """The lists of segments that do not overlap, each in ascending order; zeros follow.

    `trim`: as wide as the longest row needs, rounded up to a multiple of 16; else as wide as there are columns.
    """
    device = segments.row.device
    row, start, stop = segments
    length = stop - start
    count = torch.zeros(rows, dtype=torch.int64, device=device).index_add_(0, row, length)
    width = columns
    if trim and columns > _WIDTH:
        longest = int(count.max()) if rows else 0
        width = min(columns, -(-max(longest, 1) // _WIDTH) * _WIDTH)
    if not len(row) or not width:
        return Lists(count.to(torch.int32), torch.zeros(rows, width, dtype=torch.int32, device=device))
    order = torch.argsort(row * columns + start)
    row, start, length = row[order], start[order], length[order]
    if bool((row[1:] > row[:-1]).all()):
        return Lists(count.to(torch.int32), _counted(start.new_zeros(rows).index_copy_(0, row, start), count, width))
    index = torch.zeros(rows, width, dtype=torch.int32, device=device)
    ends = length.cumsum(0)
    # Where each segment begins in the flattened lists.
    place = row * width + (ends - length) - (count.cumsum(0) - count)[row]
    _write(index.view(-1), place, start, length, ends)
    return Lists(count.to(torch.int32), index)


def _counted(first: Tensor, count: Tensor, width: int) -> Tensor:
    """Rows of one segment each: adjacent blocks from the first on."""
    step = max(1, _EXPANDED // width)
    index = torch.empty(len(first), width, dtype=torch.int32, device=first.device)
    places = torch.arange(width, dtype=torch.int32, device=first.device)
    for i in range(0, len(first), step):
        used = places < count[i : i + step].view(-1, 1)
        torch.mul(places + first[i : i + step].to(torch.int32).view(-1, 1), used, out=index[i : i + step])
    return index


def _write(flat: Tensor, place: Tensor, start: Tensor, length: Tensor, ends: Tensor) -> None:
    total = int(ends[-1])
    marks = torch.arange(_EXPANDED, max(total, _EXPANDED), _EXPANDED, device=ends.device)
    cuts = [0, *torch.searchsorted(ends, marks).tolist(), len(ends)] if len(marks) else [0, len(ends)]
    for first, last in pairwise(cuts):
        if last > first:
            long = length[first:last]
            size = int(ends[last - 1]) - (int(ends[first - 1]) if first else 0)
            steps = torch.arange(size, device=flat.device)
            steps -= (long.cumsum(0) - long).repeat_interleave(long, output_size=size)
            at = place[first:last].repeat_interleave(long, output_size=size) + steps
            steps += start[first:last].repeat_interleave(long, output_size=size)
            flat[at] = steps.to(torch.int32)


def adjacent(segments: Segments, rows: int) -> bool:
    """Whether the blocks of each row are adjacent."""
    row, start, stop = segments
    zero = torch.zeros(rows, dtype=torch.int64, device=row.device)
    count = zero.index_add(0, row, stop - start)
    first = (zero + torch.iinfo(torch.int64).max // 2).scatter_reduce(0, row, start, "amin")
    end = zero.scatter_reduce(0, row, stop, "amax")
    return bool(((count == 0) | (end - first == count)).all())
