"""Gradients of captured tensors, tile by tile: summed along what an index does not depend on, added up at the end.

For `slopes[h]` or `gate[b, h, q_idx]` a tile gives one number a row, for `gate[b, h, kv_idx]` one a column, for a table of
distances one a diagonal. Only what has none of these forms is added element by element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..codegen.access import Access, Pattern
from ..codegen.evaluate import Inputs, Pool
from ..codegen.ir import Node, Op
from ..problem import Problem
from .captured_gradients import Block, CapturedGradients, block_of
from .schedule import Split

# A number a head is the sum of its rows.
_SUMMED = {
    Pattern.HEAD: Pattern.ROW,
    Pattern.ROW: Pattern.ROW,
    Pattern.COLUMN: Pattern.COLUMN,
    Pattern.DIAGONAL: Pattern.DIAGONAL,
}


class Piece(NamedTuple):
    """Where the elements [nb, nh, G, rows, columns] of a tile are."""

    split: Split
    rows: tuple[int, int]
    ranges: Sequence[tuple[int, int]]  # contiguous keys, in the order of the columns

    def columns(self, x: Tensor) -> list[tuple[int, int, Tensor]]:
        """Each range of keys, and the part of x [..., columns] that belongs to it."""
        if len(self.ranges) == 1:
            return [(*self.ranges[0], x)]
        parts = x.split([stop - start for start, stop in self.ranges], -1)
        return [(*keys, part) for keys, part in zip(self.ranges, parts, strict=True)]


class _Sum(NamedTuple):
    """What is summed, and along what: loads that agree in both share it."""

    pattern: Pattern
    gradient: Node


class TileSums:
    """The gradients of the wanted captured tensors of a problem.

    Attributes:
        graphs: what a tile must evaluate, each once; `add` wants their values.
    """

    def __init__(self, problem: Problem, wanted: Sequence[int], dtype: torch.dtype, pool: Pool) -> None:
        self.problem, self.pool, self.captured = problem, pool, CapturedGradients(problem, wanted, dtype)
        self._loads: dict[_Sum, list[tuple[Access, bool]]] = {}  # and whether the sum is subtracted
        self._single: list[tuple[Access, Node, Block | None]] = []
        for to, gradient in self.captured.contributions:
            pattern = _SUMMED.get(to.pattern)
            if pattern is None:
                self._single.append((to, gradient, block_of(problem, to)))
                continue
            negative = gradient.op is Op.NEG
            key = _Sum(pattern, gradient.lhs if negative else gradient)
            self._loads.setdefault(key, []).append((to, negative))
        self.graphs = tuple(dict.fromkeys([*(s.gradient for s in self._loads), *(g for _, g, _ in self._single)]))
        self._sums: dict[_Sum, Tensor] = {}

    def add(self, values: Mapping[Node, Tensor], piece: Piece, inputs: Inputs) -> None:
        """Add the values of `graphs` in one tile, zero where masked; `inputs` are those they were evaluated from."""
        for key in self._loads:
            x = values[key.gradient]
            if key.pattern is Pattern.ROW:
                self._put(key, piece, piece.rows[0], x.sum(-1).flatten(1, 2))
            elif key.pattern is Pattern.COLUMN:
                for start, _, sums in piece.columns(x.sum(-2).flatten(1, 2)):
                    self._put(key, piece, start, sums)
            else:
                for start, _, part in piece.columns(x):
                    sums = diagonals(part.flatten(0, 2), self.pool).view(x.shape[0], x.shape[1] * x.shape[2], -1)
                    self._put(key, piece, start - piece.rows[1] + self.problem.query.shape[2], sums)
        for to, gradient, block in self._single:
            if block is None:
                self.captured.add(to, values[gradient], inputs)
            else:
                for start, _, part in piece.columns(values[gradient]):
                    self.captured.add_dense(to, block, part, inputs, (piece.rows[0], start))

    def results(self) -> list[Tensor]:
        """The gradients, in the order and the dtypes of the wanted tensors."""
        captured = self.captured
        adders = {
            Pattern.ROW: captured.add_rows,
            Pattern.COLUMN: captured.add_columns,
            Pattern.DIAGONAL: captured.add_diagonals,
        }
        for key, sums in self._sums.items():
            for to, negative in self._loads[key]:
                adders[key.pattern](to, -sums if negative else sums)
        return captured.results()

    def _put(self, key: _Sum, piece: Piece, start: int, sums: Tensor) -> None:
        """Add to sums [B, Hq, L], [B, Hq, S] or [B, Hq, L + S - 1], from position `start` on."""
        total = self._sums.get(key)
        if total is None:
            B, H, L, _ = self.problem.query.shape
            S = self.problem.key.shape[2]
            shape = B, H, {Pattern.ROW: L, Pattern.COLUMN: S, Pattern.DIAGONAL: L + S - 1}[key.pattern]
            if sums.shape == shape:  # the only tile, or the first to add to all
                self._sums[key] = sums.to(self.captured.dtype)
                return
            total = self._sums[key] = torch.zeros(shape, dtype=self.captured.dtype, device=self.captured.device)
        total[piece.split.batches, piece.split.heads, start : start + sums.shape[2]] += sums


def diagonals(x: Tensor, pool: Pool) -> Tensor:
    """Sums [N, rows + columns - 1] of x [N, rows, columns] along its diagonals, from the lower left one to the upper right.

    Written at a pitch of `rows + columns` and read at one more, a row begins one to the left of the row above it.
    """
    N, rows, columns = x.shape
    pitch, size = rows + columns, rows * (rows + columns + 1)
    skewed = pool.take((N, size), x.dtype)
    skewed.as_strided((N, rows, columns), (size, pitch, 1), skewed.storage_offset() + rows).copy_(x)
    between = skewed.as_strided((N, rows + 1, rows), (size, pitch, 1), skewed.storage_offset())
    between.zero_()
    sums = skewed.view(N, rows, pitch + 1).sum(1)[:, 1:-1]
    pool.give(skewed)
    return sums
