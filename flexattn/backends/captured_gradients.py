"""Gradients of captured tensors: what backends have summed by access pattern, added to the entries that were read.

A backend reduces the contributions of its tiles as far as `codegen.access` allows: to a row [B, Hq, L], a column
[B, Hq, S], or a sum for each diagonal [B, Hq, L + S - 1]. What arrives here is small, and is added in an order that does
not change from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..codegen.access import Access, Axis, access
from ..codegen.evaluate import Inputs, broadcast, evaluate, wrap_index
from ..codegen.ir import Node
from ..problem import Problem

COPIES = 1 << 20  # elements: many contributions to a short tensor are added to so many entries, copies of it, at once


class Contribution(NamedTuple):
    """A load, and the graph of what one element adds to the entry it reads."""

    access: Access
    gradient: Node


class Block(NamedTuple):
    """Where in a DENSE tensor the gradient of query 0 and key 0 goes: entries along its two axes."""

    q: int
    kv: int


class CapturedGradients:
    """Sums of the gradients of captured tensors, in the compute dtype.

    Attributes:
        contributions: those of the wanted tensors that are not zero everywhere.
    """

    def __init__(self, problem: Problem, wanted: Sequence[int], dtype: torch.dtype) -> None:
        self.problem, self.wanted, self.dtype = problem, wanted, dtype
        self.device = problem.query.device
        self.sums = {i: self._zeros(problem.captured[i].shape) for i in wanted}
        self.contributions = contributions(problem, wanted)
        self._dense: dict[Node, Tensor] = {}

    def add(self, to: Access, values: Tensor, inputs: Inputs) -> None:
        """Add `values` to the entries that `to` reads at the indices of `inputs`, which broadcast against them."""
        total = self.sums[to.number]
        index = [wrap_index(i, n) for i, n in zip(evaluate(to.indices, inputs), total.shape, strict=True)]
        shape = broadcast(*(i.shape for i in index)) if index else ()
        values = _summed(values.to(total.dtype), shape)
        if not index:
            total += values.sum()
        elif total.numel():
            flat = torch.zeros((), dtype=torch.int64, device=self.device)
            for i, n in zip(index, total.shape, strict=True):
                flat = flat * n + i
            _scatter(total.view(-1), flat.expand(values.shape).reshape(-1), values.reshape(-1))

    def add_rows(self, to: Access, sums: Tensor) -> None:
        """Add sums over the keys, [B, Hq, L], for a load whose index does not depend on kv_idx."""
        self.add(to, sums, self._inputs(self._positions(sums.shape[2]), self._positions(1)))

    def add_columns(self, to: Access, sums: Tensor) -> None:
        """Add sums over the queries, [B, Hq, S], for a load whose index does not depend on q_idx."""
        self.add(to, sums, self._inputs(self._positions(1), self._positions(sums.shape[2])))

    def add_diagonals(self, to: Access, sums: Tensor) -> None:
        """Add sums [B, Hq, L + S - 1] over the elements with kv_idx - q_idx = -(L - 1), ..., S - 1."""
        along = self._positions(sums.shape[2]) - (self.problem.query.shape[2] - 1)
        self.add(to, sums, self._inputs((-along).clamp(min=0), along.clamp(min=0)))

    def add_dense(self, to: Access, block: Block, values: Tensor, inputs: Inputs, start: tuple[int, int]) -> None:
        """Add `values` [..., rows, columns], whose first element is query and key `start`, for a DENSE load.

        `inputs` holds b and h, which broadcast against the leading dimensions. Values may be a buffer that is reused.
        """
        assert to.q is not None and to.kv is not None
        total = self._dense_sum(to)
        rows, columns = values.shape[-2:]
        q, kv = block.q + start[0], block.kv + start[1]
        target = total[:, q : q + rows, kv : kv + columns]
        slab = torch.zeros((), dtype=torch.int64, device=self.device)
        for d, n in enumerate(self.problem.captured[to.number].shape):
            if d not in (to.q.dim, to.kv.dim):
                (i,) = evaluate([to.indices[d]], inputs)
                slab = slab * n + wrap_index(i, n)
        shape = (1,) * (values.dim() - slab.dim()) + tuple(slab.shape)
        values = _summed(values.to(total.dtype), (*shape[:-2], rows, columns))
        if total.shape[0] == 1:
            target += values.reshape(-1, rows, columns).sum(0)
        else:
            _scatter(target, slab.expand(shape).reshape(-1), values.reshape(-1, rows, columns))

    def results(self) -> list[Tensor]:
        """The gradients of the wanted tensors, in their dtypes, on their devices."""
        for load, total in self._dense.items():
            to = access(load)
            assert to.q is not None and to.kv is not None
            shape = self.sums[to.number].shape
            last = (to.q.dim, to.kv.dim)
            rest = [n for d, n in enumerate(shape) if d not in last]
            self.sums[to.number] += total.view(*rest, *(shape[d] for d in last)).movedim((-2, -1), last)
        like = [self.problem.captured[i] for i in self.wanted]
        return [self.sums[i].to(t.device, t.dtype) for i, t in zip(self.wanted, like, strict=True)]

    def _dense_sum(self, to: Access) -> Tensor:
        """[entries of the other dimensions, entries along q, entries along kv]"""
        assert to.q is not None and to.kv is not None
        if to.load not in self._dense:
            shape = self.problem.captured[to.number].shape
            q, kv = shape[to.q.dim], shape[to.kv.dim]
            others = math.prod(n for d, n in enumerate(shape) if d not in (to.q.dim, to.kv.dim))
            self._dense[to.load] = self._zeros((others, q, kv))
        return self._dense[to.load]

    def _positions(self, n: int) -> Tensor:
        return torch.arange(n, dtype=torch.int32, device=self.device)

    def _inputs(self, q_idx: Tensor, kv_idx: Tensor) -> Inputs:
        """Indices that broadcast against [B, Hq, ...]."""
        B, H = self.problem.query.shape[:2]
        named = {
            "b": self._positions(B).view(-1, 1, 1),
            "h": self._positions(H).view(-1, 1),
            "q_idx": q_idx,
            "kv_idx": kv_idx,
        }
        return inputs_of(self.problem, named)

    def _zeros(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


def contributions(problem: Problem, wanted: Sequence[int]) -> list[Contribution]:
    """The contributions to the wanted captured tensors; one that does not depend on the loss is zero and left out."""
    found = [Contribution(access(load), gradient) for load, gradient in problem.variant.derivative.loads]
    return [c for c in found if c.access.number in wanted and "grad" in c.gradient.axes]


def inputs_of(problem: Problem, named: dict[str, Tensor]) -> Inputs:
    """What graphs of the problem are evaluated from, at indices `named`."""
    return Inputs(named, problem.tensors, problem.floats, problem.ints, problem.query.device)


def block_of(problem: Problem, to: Access) -> Block | None:
    """Where the gradients of a DENSE load go; None for another load, or if some of its entries are read beyond an end."""
    if to.q is None or to.kv is None:
        return None
    shape = problem.captured[to.number].shape
    q = _start(problem, to.q, problem.query.shape[2], shape)
    kv = _start(problem, to.kv, problem.key.shape[2], shape)
    return None if q is None or kv is None else Block(q, kv)


def _start(problem: Problem, axis: Axis, length: int, shape: Sequence[int]) -> int | None:
    (value,) = evaluate([axis.offset], Inputs({}, (), problem.floats, problem.ints))
    start = int(value)
    return start if 0 <= start and start + length <= shape[axis.dim] else None


def _summed(values: Tensor, shape: Sequence[int]) -> Tensor:
    """`values`, summed along the axes that `shape`, which broadcasts against them, does not have."""
    shape = (1,) * (values.dim() - len(shape)) + tuple(shape)
    axes = [d for d, n in enumerate(shape) if n == 1 and values.shape[d] > 1]
    return values.sum(axes, keepdim=True) if axes else values


def _scatter(total: Tensor, index: Tensor, values: Tensor) -> None:
    """`total[index[i]] += values[i]` along the first axis, in an order that is the same in every run."""
    if not total.is_cuda:
        total.index_add_(0, index, values)
        return
    # On a GPU this sorts the indices, where index_add_ uses atomics. One entry's values are added one after another, so a
    # short tensor that gets many is given copies.
    size, n = total.shape[0], index.shape[0]
    copies = min(n // (64 * size), COPIES // max(1, total.numel()))
    if copies < 2:
        total.index_put_((index,), values, accumulate=True)
        return
    which = torch.arange(n, device=index.device) * copies // n
    many = torch.zeros((copies * size, *total.shape[1:]), dtype=total.dtype, device=total.device)
    many.index_put_((which * size + index,), values, accumulate=True)
    total += many.view(copies, *total.shape).sum(0)
