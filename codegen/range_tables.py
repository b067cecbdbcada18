"""The lowest and highest element of a captured tensor over ranges of its indices, many ranges at once.

Where one index is a range: a sparse table (Bender and Farach-Colton, 2000, section 3) of the extremes of all runs of 1, 2,
4, ... cells; two of them cover any range. A cell is one element where memory allows, else a few, and ranges are then
widened to whole cells. Where more than one index is a range, cells are boxes as large as the largest range, of which a
range meets at most two a side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .evaluate import wrap_index

Range = tuple[Tensor, Tensor]
_BOXED_AT_MOST = 1 << 24  # elements of a tensor with two or more ranges that are worth reading once


class RangeTables:
    """Tables of the tensors of one computation; each is made when it is first needed.

    `memory`: bytes that all tables may take. A table that would take more is made of larger cells, or not at all.
    """

    def __init__(self, memory: int) -> None:
        self.memory = self.left = memory
        self._made: dict[tuple[object, ...], tuple[Tensor, ...] | None] = {}

    def load(self, tensor: Tensor, index: Sequence[Range]) -> tuple[Tensor, ...] | None:
        """(lowest, highest), or None if nothing is known. Of floats, nan stands for any value and nan.

        Each index is a lowest and a highest position, wrapped and clamped as a load does; `lo is hi` says that it is one
        position.
        """
        if tensor.numel() == 0:  # which a load reads as zeros
            return tensor.new_zeros(()), tensor.new_zeros(())
        within = [_clamped(i, n) for i, n in zip(index, tensor.shape, strict=True)]
        ranges = [d for d, (lo, hi) in enumerate(within) if lo is not hi]
        return self._runs(tensor, within, ranges[0]) if len(ranges) == 1 else self._boxes(tensor, within, ranges)

    def _runs(self, tensor: Tensor, index: list[Range], dim: int) -> tuple[Tensor, ...] | None:
        n = tensor.shape[dim]
        cell = 1
        while (size := _size(tensor, dim, cell)) > self.memory // 4 and cell < n:
            cell *= 4
        made = self._table((id(tensor), dim), size, lambda: _runs(tensor, dim, cell))
        if made is None:
            return None
        first, last = (torch.div(end, cell, rounding_mode="floor") for end in index[dim])
        level = torch.frexp((last - first + 1).double()).exponent.long() - 1
        places = [i for d, (i, _) in enumerate(index) if d != dim]
        ends = (level, *places, first), (level, *places, last + 1 - 2**level)
        low = torch.minimum(made[0][ends[0]], made[0][ends[1]])
        high = torch.maximum(made[1][ends[0]], made[1][ends[1]])
        if cell > 1:
            single = index[dim][0] == index[dim][1]
            value = tensor.detach()[tuple(lo for lo, _ in index)]
            low, high = torch.where(single, value, low), torch.where(single, value, high)
        return low, high

    def _boxes(self, tensor: Tensor, index: list[Range], ranges: list[int]) -> tuple[Tensor, ...] | None:
        if tensor.numel() > _BOXED_AT_MOST:
            return None
        widths = [int((hi - lo).max()) + 1 if d in ranges else 1 for d, (lo, hi) in enumerate(index)]
        cells = math.prod(-(-n // w) for n, w in zip(tensor.shape, widths, strict=True))
        size = 2 * cells * tensor.dtype.itemsize
        made = self._table((id(tensor), *widths), size, lambda: _boxes(tensor.detach(), widths))
        if made is None:
            return None
        corners: list[list[Tensor]] = [[]]
        for (lo, hi), width in zip(index, widths, strict=True):
            ends = [torch.div(end, width, rounding_mode="floor") for end in ([lo] if lo is hi else [lo, hi])]
            corners = [[*c, end] for c in corners for end in ends]
        low, high = made[0][tuple(corners[0])], made[1][tuple(corners[0])]
        for corner in corners[1:]:
            low, high = torch.minimum(low, made[0][tuple(corner)]), torch.maximum(high, made[1][tuple(corner)])
        return low, high

    def _table(
        self, key: tuple[object, ...], size: int, make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...] | None:
        if key not in self._made:
            fits = size <= self.left
            self.left -= size if fits else 0
            self._made[key] = make() if fits else None
        return self._made[key]


def _clamped(index: Range, size: int) -> Range:
    lo, hi = index
    if lo is hi:
        at = wrap_index(lo, size)
        return at, at
    # What may be negative and may not be reaches anything.
    both = (lo < 0) & (hi >= 0)
    return wrap_index(lo.where(~both, 0), size), wrap_index(hi.where(~both, size - 1), size)


def _size(tensor: Tensor, dim: int, cell: int) -> int:
    cells = -(-tensor.shape[dim] // cell)
    return tensor.numel() // tensor.shape[dim] * cells * cells.bit_length() * 2 * tensor.dtype.itemsize


def _runs(tensor: Tensor, dim: int, cell: int) -> tuple[Tensor, ...]:
    """Minimum and maximum of the 2^k cells from each cell on, [k, ..., cells]; `dim` comes last."""
    data = tensor.detach().movedim(dim, -1)
    levels = ([_pooled(data, data.dim() - 1, cell, torch.amin)], [_pooled(data, data.dim() - 1, cell, torch.amax)])
    cells, step = levels[0][0].shape[-1], 1
    while 2 * step <= cells:
        for made, combine in zip(levels, (torch.minimum, torch.maximum), strict=True):
            # The last few runs would end beyond the tensor, and are never asked for.
            ahead = torch.cat([made[-1][..., step:], made[-1][..., -step:]], -1)
            made.append(combine(made[-1], ahead))
        step *= 2
    return torch.stack(levels[0]), torch.stack(levels[1])


def _boxes(tensor: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
    """Minimum and maximum of each cell."""
    low = high = tensor
    for d, width in enumerate(widths):
        low, high = _pooled(low, d, width, torch.amin), _pooled(high, d, width, torch.amax)
    return low, high


def _pooled(t: Tensor, dim: int, width: int, reduce: Callable[..., Tensor]) -> Tensor:
    if width == 1:
        return t
    short = -t.shape[dim] % width
    if short:
        t = torch.cat([t, t.narrow(dim, t.shape[dim] - 1, 1).expand(*t.shape[:dim], short, *t.shape[dim + 1 :])], dim)
    return reduce(t.unflatten(dim, (-1, width)), dim + 1)
