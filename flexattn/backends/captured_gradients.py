"""Gradients of captured tensors: what backends have summed by access pattern, added to the entries that were read.

A backend reduces the contributions of its tiles as far as `codegen.access` allows: to a row [B, Hq, L], a column
[B, Hq, S], or a sum for each diagonal [B, Hq, L + S - 1]. What arrives here is small, and is added in an order that does
not change from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..codegen.access import Access, Axis, Pattern, access
from ..codegen.evaluate import Inputs, evaluate, wrap_index
from ..codegen.ir import Node, Op, walk
from ..problem import Problem
from .indices import KEPT_ELEMENTS

COPIES = 1 << 20  # elements: many contributions to a short tensor are added to so many entries, copies of it, at once


class Contribution(NamedTuple):
    """A load, and the graph of what one element adds to the entry it reads."""

    access: Access
    gradient: Node


class Block(NamedTuple):
    """Where in a DENSE tensor the gradient of query 0 and key 0 goes: entries along its two axes."""

    q: int
    kv: int


class Line(NamedTuple):
    """Sums [B, H, n]: one for each query, key, or distance."""

    along: Pattern
    B: int
    H: int
    n: int
    L: int
    device: torch.device

    def named(self) -> dict[str, Tensor]:
        """Indices that broadcast against the sums."""

        def positions(n: int) -> Tensor:
            return torch.arange(n, dtype=torch.int32, device=self.device)

        own, none = positions(self.n), torch.zeros((), dtype=torch.int32, device=self.device)
        q_idx, kv_idx = {Pattern.ROW: (own, none), Pattern.COLUMN: (none, own)}.get(self.along, (none, none))
        if self.along is Pattern.DIAGONAL:
            distance = own - (self.L - 1)
            q_idx, kv_idx = (-distance).clamp(min=0), distance.clamp(min=0)
        return {
            "b": positions(self.B).view(-1, 1, 1),
            "h": positions(self.H).view(-1, 1),
            "q_idx": q_idx,
            "kv_idx": kv_idx,
        }


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
        self._beyond: dict[Node, Tensor] = {}
        self._apart: list[tuple[Tensor, Tensor]] = []  # sums of some DENSE loads, and the entries they belong to

    def add(self, to: Access, values: Tensor, inputs: Inputs) -> None:
        """Add `values` to the entries that `to` reads at the indices of `inputs`, which broadcast against them."""
        self._add_at(to, values, _entries(to, tuple(self.sums[to.number].shape), inputs))

    def add_entries(self, to: Access, values: Tensor, entries: Tensor) -> None:
        """Add `values` [n] to the entries with the numbers `entries` [n], counted as in a contiguous tensor."""
        self._add_at(to, values, entries.long())

    def add_rows(self, to: Access, sums: Tensor) -> None:
        """Add sums over the keys, [B, Hq, L], for a load whose index does not depend on kv_idx."""
        self._add_sums(to, sums, Pattern.ROW)

    def add_columns(self, to: Access, sums: Tensor) -> None:
        """Add sums over the queries, [B, Hq, S], for a load whose index does not depend on q_idx."""
        self._add_sums(to, sums, Pattern.COLUMN)

    def add_diagonals(self, to: Access, sums: Tensor) -> None:
        """Add sums [B, Hq, L + S - 1] over the elements with kv_idx - q_idx = -(L - 1), ..., S - 1."""
        self._add_sums(to, sums, Pattern.DIAGONAL)

    def add_dense(self, to: Access, block: Block, values: Tensor, inputs: Inputs, start: tuple[int, int]) -> None:
        """Add `values` [..., rows, columns], whose first element is query and key `start`, for a DENSE load.

        `inputs` holds b and h, which broadcast against the leading dimensions. Values may be a buffer that is reused.
        """
        assert to.q is not None and to.kv is not None
        if not values.numel() or not self.sums[to.number].numel():
            return
        total = self._dense_sum(to)
        rows, columns = values.shape[-2:]
        q, kv = block.q + start[0], block.kv + start[1]
        target = total[:, q : q + rows, kv : kv + columns]
        slab = self._slab(to, inputs)
        shape = (1,) * values.dim() if slab is None else (1,) * (values.dim() - slab.dim()) + tuple(slab.shape)
        values = _summed(values.to(total.dtype), (*shape[:-2], rows, columns))
        if total.shape[0] == 1 or slab is None:
            target += values.reshape(-1, rows, columns).sum(0)
        else:
            scatter(target, slab.expand(shape).reshape(-1), values.reshape(-1, rows, columns))

    def add_dense_beyond(self, to: Access, values: Tensor, inputs: Inputs, start: int) -> None:
        """Add `values` [heads, rows, S], from query `start` on, for a DENSE load that reads beyond an end of its tensor.

        There it reads the entry at the border, or from the other end, so that elements share entries.
        """
        assert to.q is not None and to.kv is not None
        if not values.numel() or not self.sums[to.number].numel():
            return
        total = self._beyond_sum(to)
        heads, rows, S = values.shape
        _, n_q, n_kv = total.shape
        numbers = self.problem.floats, self.problem.ints, self.device
        position = {"q_idx": torch.arange(start, start + rows, dtype=torch.int32, device=self.device)}
        position["kv_idx"] = torch.arange(S, dtype=torch.int32, device=self.device)
        q, kv = evaluate([to.indices[to.q.dim], to.indices[to.kv.dim]], Inputs(position, (), *numbers))
        by_key = self._zeros((n_kv, heads * rows))
        scatter(by_key, wrap_index(kv, n_kv), values.reshape(-1, S).T)
        slab, line = self._slab(to, inputs), wrap_index(q, n_q)
        line = (line if slab is None else slab.view(-1, 1) * n_q + line).expand(heads, rows)
        scatter(total.view(-1, n_kv), line.reshape(-1), by_key.T)

    def totals(self) -> tuple[Tensor, ...]:
        """What has been added up so far, before `results` puts it together."""
        return (*self.sums.values(), *(apart for _, apart in self._apart))

    def results(self) -> list[Tensor]:
        """The gradients of the wanted tensors, in their dtypes, on their devices."""
        for place, apart in self._apart:
            place += apart.view(place.shape)
        like = [self.problem.captured[i] for i in self.wanted]
        return [self.sums[i].to(t.device, t.dtype) for i, t in zip(self.wanted, like, strict=True)]

    def _slab(self, to: Access, inputs: Inputs) -> Tensor | None:
        """The entries of the dimensions beside the two axes of a DENSE tensor, as one index; None: there are none."""
        assert to.q is not None and to.kv is not None
        others = [d for d in range(len(to.indices)) if d not in (to.q.dim, to.kv.dim)]
        sizes = self.problem.captured[to.number].shape
        return _flat(evaluate([to.indices[d] for d in others], inputs), [sizes[d] for d in others])

    def _dense_sum(self, to: Access) -> Tensor:
        """[entries of the other dimensions, entries along q, entries along kv]: the sums themselves where a view can be so."""
        assert to.q is not None and to.kv is not None
        if to.load not in self._dense:
            place = self.sums[to.number].movedim((to.q.dim, to.kv.dim), (-2, -1))
            shape = math.prod(place.shape[:-2]), *place.shape[-2:]
            try:
                self._dense[to.load] = place.view(shape)
            except RuntimeError:  # other dimensions on both sides of an axis
                self._dense[to.load] = self._zeros(shape)
                self._apart.append((place, self._dense[to.load]))
        return self._dense[to.load]

    def _beyond_sum(self, to: Access) -> Tensor:
        """As `_dense_sum`, in this order in memory."""
        assert to.q is not None and to.kv is not None
        if to.load not in self._beyond:
            place = self.sums[to.number].movedim((to.q.dim, to.kv.dim), (-2, -1))
            self._beyond[to.load] = self._zeros((math.prod(place.shape[:-2]), *place.shape[-2:]))
            self._apart.append((place, self._beyond[to.load]))
        return self._beyond[to.load]

    def _add_sums(self, to: Access, sums: Tensor, along: Pattern) -> None:
        shape = tuple(self.sums[to.number].shape)
        B, H, n = sums.shape
        line = Line(along, B, H, n, self.problem.query.shape[2], self.device)
        numbers = tuple(self.problem.floats), tuple(self.problem.ints)
        small = self.device.type == "cpu" and sums.numel() <= KEPT_ELEMENTS
        # As a key, a zero has no sign.
        if small and not _reads_a_tensor(to.load) and not any(isinstance(x, Tensor) or x == 0 for x in numbers[0]):
            entries = _kept_entries(to.load, shape, line, *numbers)
        else:
            entries = _entries(to, shape, inputs_of(self.problem, line.named()))
        self._add_at(to, sums, entries)

    def _add_at(self, to: Access, values: Tensor, entries: Tensor | None) -> None:
        total = self.sums[to.number]
        if entries is None:
            total += values.sum()
        elif total.numel():
            values = _summed(values.to(total.dtype), entries.shape)
            scatter(total.view(-1), entries.expand(values.shape).reshape(-1), values.reshape(-1))

    def _zeros(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


def contributions(problem: Problem, wanted: Sequence[int]) -> list[Contribution]:
    """The contributions to the wanted captured tensors; one that does not depend on the loss is zero and left out."""
    if not wanted:
        return []
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
    offset = axis.offset
    if not offset.is_const:
        (value,) = evaluate([offset], Inputs({}, (), problem.floats, problem.ints))
    start = int(offset.value if offset.is_const else value)  # type: ignore[arg-type]
    return start if 0 <= start and start + length <= shape[axis.dim] else None


@lru_cache(maxsize=1024)
def _reads_a_tensor(load: Node) -> bool:
    """To know its index."""
    return any(n.op is Op.LOAD for n in walk(*load.args[1:]))


def _entries(to: Access, shape: tuple[int, ...], inputs: Inputs) -> Tensor | None:
    """The numbers of the entries that a load reads, of the smallest shape that its index needs; None: there is one entry."""
    return _flat(evaluate(to.indices, inputs), shape)


@lru_cache(maxsize=128)
def _kept_entries(
    load: Node, shape: tuple[int, ...], line: Line, floats: tuple[float, ...], ints: tuple[int, ...]
) -> Tensor | None:
    return _entries(access(load), shape, Inputs(line.named(), (), floats, ints, line.device))


def _flat(index: Sequence[Tensor], shape: Sequence[int]) -> Tensor | None:
    """The index of each dimension as one index of all."""
    flat: Tensor | None = None
    for i, n in zip(index, shape, strict=True):
        i = wrap_index(i, n)
        flat = i if flat is None else flat * n + i
    return flat


def _summed(values: Tensor, shape: Sequence[int]) -> Tensor:
    """`values`, summed along the axes that `shape`, which broadcasts against them, does not have."""
    shape = (1,) * (values.dim() - len(shape)) + tuple(shape)
    axes = [d for d, n in enumerate(shape) if n == 1 and values.shape[d] > 1]
    return values.sum(axes, keepdim=True) if axes else values


def scatter(total: Tensor, index: Tensor, values: Tensor) -> None:
    """`total[index[i]] += values[i]` along the first axis, in an order that is the same in every run."""
    if not total.is_cuda:
        found = index.tolist() if total.dim() > 1 else []
        if found and found == list(range(found[0], found[0] + len(found))):
            total[found[0] : found[0] + len(found)] += values
        else:
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
