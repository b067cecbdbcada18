"""Classification of the blocks of a mask: empty, partial or full, exactly, at the cost of the mask's boundary.

Coarse boxes come first. What `intervals` proves empty or full is settled, the rest is split, down to blocks. A block
still undecided is looked at: if some of its elements, its corners among them, are attended and some are not, it is
partial; only else are all of its elements evaluated. Masks whose keys are one range for each query (`key_ranges`) need
none of this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .bounds import Bounds
from .evaluate import TORCH_DTYPE, Inputs, Pool, evaluate
from .intervals import Context, bounds
from .ir import Node, Op, walk
from .key_ranges import segments_by_query
from .pipeline import Variant
from .relabel import relabelled
from .tile_lists import Segments, adjacent, joined, lists_of

DEFAULT_MEMORY = 256 << 20
_ROOTS = 4096  # boxes to begin with, about
_SPLIT = 4  # a box is split in so many pieces a side
_SAMPLES = 4  # elements a side of a block that are looked at first
_SMALLEST = 16  # elements a side below which bounds cost as much as the elements
_CHUNK = 1 << 19  # elements evaluated at once: more do not fit in a cache
_BOXES = 1 << 16  # boxes bounded at once, for the same reason


class Tiles(NamedTuple):
    """Block lists of a classified mask: counts [B', H', rows] and indices [B', H', rows, columns], int32.

    B' and H' are 1 where the mask does not depend on the batch or the head. `contiguous`: the full blocks of each row
    are adjacent, so that kernels may count them instead of reading their lists.
    """

    partial_count: Tensor
    partial_index: Tensor
    full_count: Tensor
    full_index: Tensor
    contiguous: bool


class _Boxes(NamedTuple):
    """Boxes of blocks, int64 [N]: the entry of batch and heads, the first row and column of blocks."""

    lead: Tensor
    row: Tensor
    column: Tensor


def classify(
    variant: Variant,
    captured: Sequence[Tensor],
    ints: Sequence[int],
    shape: tuple[int, int, int, int],
    block_size: tuple[int, int],
    device: torch.device,
    memory: int = DEFAULT_MEMORY,
    trim: bool = True,
) -> Tiles:
    """The lists of the partial and the full blocks of a mask.

    `shape` is (B, H, Q, KV); `captured` ends with the variant's run-time floats. `memory` is the number of bytes that the
    work may take besides the captured tensors and the lists. `trim` makes lists as wide as the longest row needs.
    """
    B, H, Q, KV = shape
    axes = frozenset() if variant.mask is None else variant.mask.axes
    B, H = (B if "b" in axes else 1), (H if "h" in axes else 1)
    rows, columns = -(-Q // block_size[0]), -(-KV // block_size[1])
    partial = full = joined([], device)
    if min(B, H, rows, columns) > 0:
        if variant.mask is None:
            row = torch.arange(B * H * rows, device=device)
            full = Segments(row, torch.zeros_like(row), torch.full_like(row, columns))
        else:
            n = len(captured) - variant.n_floats
            inputs = Inputs({}, captured[:n], captured[n:], ints, device)
            mask, inputs = relabelled(variant.mask, inputs)
            size = min(block_size[0], Q), min(block_size[1], KV)
            work = _Work(mask, inputs, (B, H, Q, KV), size, memory)
            by_query = segments_by_query(mask, inputs, work.context.wrapping, work.shape, size, memory)
            partial, full = by_query or work.segments()
    found = [lists_of(s, B * H * rows, columns, trim) for s in (partial, full)]
    shaped = [t.view(B, H, rows, *t.shape[1:]) for lists in found for t in lists]
    return Tiles(shaped[0], shaped[1], shaped[2], shaped[3], adjacent(full, B * H * rows))


@dataclass(frozen=True)
class _Work:
    """One classification, box by box."""

    mask: Node
    inputs: Inputs
    shape: tuple[int, int, int, int]
    size: tuple[int, int]
    memory: int

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.shape[2] // self.size[0]), -(-self.shape[3] // self.size[1])

    @cached_property
    def context(self) -> Context:
        """What bounds are computed from; made once, over the whole mask."""
        low = torch.zeros(1, dtype=torch.int64, device=self.inputs.device)
        whole = {n: Bounds(low, low + s - 1) for n, s in zip(("b", "h", "q_idx", "kv_idx"), self.shape, strict=True)}
        return Context.of([self.mask], self.inputs, whole, self.memory // 4)

    @cached_property
    def nodes(self) -> list[Node]:
        return [n for n in walk(self.mask) if n.op is not Op.CAPTURED]

    @property
    def _at_once(self) -> int:
        return max(256, min(_BOXES, self.memory // (4 * 16 * (len(self.nodes) + 16))))

    def segments(self) -> tuple[Segments, Segments]:
        """The partial and the full blocks, each once."""
        partial: list[Segments] = []
        full: list[Segments] = []
        at_once = self._at_once
        side, pairs = 1, self.shape[0] * self.shape[1]
        while side < max(self.grid) and pairs * math.prod(-(-n // side) for n in self.grid) > _ROOTS:
            side *= _SPLIT
        # The last one is taken first, so that what waits stays small.
        waiting = [(side, self._roots(side))]
        while waiting:
            side, boxes = waiting.pop()
            if len(boxes.lead) > at_once:
                waiting.append((side, _Boxes(*(t[at_once:] for t in boxes))))
                boxes = _Boxes(*(t[:at_once] for t in boxes))
            found = self._bounds(boxes, side)
            full.append(self._rows(_chosen(boxes, found.lo), side))
            boxes = _chosen(boxes, found.hi & ~found.lo)
            if not len(boxes.lead):
                continue
            if side > 1:
                waiting.append((side // _SPLIT, self._split(boxes, side)))
                continue
            some, all_ = self._evaluated(boxes)
            full.append(self._rows(_chosen(boxes, all_), 1))
            partial.append(self._rows(_chosen(boxes, some & ~all_), 1))
        return joined(partial, self.inputs.device), joined(full, self.inputs.device)

    def _roots(self, side: int) -> _Boxes:
        counts = self.shape[0] * self.shape[1], -(-self.grid[0] // side), -(-self.grid[1] // side)
        places = torch.arange(math.prod(counts), device=self.inputs.device)
        column, rest = places % counts[2], places // counts[2]
        return _Boxes(rest // counts[1], rest % counts[1] * side, column * side)

    def _split(self, boxes: _Boxes, side: int) -> _Boxes:
        steps = torch.arange(_SPLIT, device=boxes.lead.device) * (side // _SPLIT)
        shape = (len(boxes.lead), _SPLIT, _SPLIT)
        row = (boxes.row.view(-1, 1, 1) + steps.view(-1, 1)).expand(shape).reshape(-1)
        column = (boxes.column.view(-1, 1, 1) + steps).expand(shape).reshape(-1)
        pieces = _Boxes(boxes.lead.view(-1, 1, 1).expand(shape).reshape(-1), row, column)
        return _chosen(pieces, (row < self.grid[0]) & (column < self.grid[1]))

    def _bounds(self, boxes: _Boxes, side: int) -> Bounds:
        H = self.shape[1]
        lead = {"b": boxes.lead // H, "h": boxes.lead % H}
        box = {name: Bounds(at, at) for name, at in lead.items()}
        for name, first, size, length in zip(("q_idx", "kv_idx"), boxes[1:], self.size, self.shape[2:], strict=True):
            box[name] = Bounds(first * size, ((first + side) * size - 1).clamp_max(length - 1))
        (found,) = bounds([self.mask], box, self.context)
        n = len(boxes.lead)
        return Bounds(found.lo.expand(n), found.hi.expand(n))

    def _rows(self, boxes: _Boxes, side: int) -> Segments:
        """Boxes as a segment in each of their rows."""
        row, column = boxes.row, boxes.column
        if side > 1:
            row = (row.view(-1, 1) + torch.arange(side, device=row.device)).view(-1)
            column = column.repeat_interleave(side)
        lead = boxes.lead.repeat_interleave(side) if side > 1 else boxes.lead
        made = Segments(lead * self.grid[0] + row, column, (column + side).clamp_max(self.grid[1]))
        return Segments(*(t[row < self.grid[0]] for t in made)) if side > 1 else made

    # ---- elements

    def _evaluated(self, blocks: _Boxes) -> tuple[Tensor, Tensor]:
        """Of each block, whether some element is attended, and whether all are."""
        device = self.inputs.device
        corners = [torch.linspace(0, n - 1, min(n, _SAMPLES), device=device).round().long() for n in self.size]
        whole = [torch.arange(n, device=device) for n in self.size]
        some, all_ = self._looked_at(blocks, corners[0], corners[1])
        # A few rows settle most of the others.
        for q, kv in ((whole[0][:: max(1, self.size[0] // 8)], whole[1]), whole):
            open_ = (some == all_).nonzero().view(-1)
            if not len(open_):
                break
            left = _chosen(blocks, open_)
            found = self._pieces(left) if q is whole[0] and self.finer else self._looked_at(left, q, kv)
            some[open_] |= found[0]
            all_[open_] &= found[1]
        return some, all_

    @cached_property
    def finer(self) -> _Work | None:
        """The same work on pieces of blocks; None where elements cost no more."""
        if min(self.size) < _SPLIT * _SMALLEST or any(n % _SPLIT for n in self.size):
            return None
        work = replace(self, size=(self.size[0] // _SPLIT, self.size[1] // _SPLIT))
        work.__dict__["context"] = self.context
        return work

    def _pieces(self, blocks: _Boxes) -> tuple[Tensor, Tensor]:
        """As `_evaluated`, piece by piece: most pieces need no evaluation."""
        finer = self.finer
        assert finer is not None
        some = torch.zeros(len(blocks.lead), dtype=torch.bool, device=blocks.lead.device)
        all_ = torch.ones_like(some)
        at_once = self._at_once // _SPLIT**2
        for i in range(0, len(blocks.lead), at_once):
            lead, row, column = (t[i : i + at_once] for t in blocks)
            parents = torch.arange(i, i + len(lead), device=lead.device)
            # The entry of batch and heads rides along with the number of the block.
            split = finer._split(_Boxes(parents, row * _SPLIT, column * _SPLIT), _SPLIT)
            parent, pieces = split.lead, split._replace(lead=blocks.lead[split.lead])
            found = finer._bounds(pieces, 1)
            one, every = found.lo.clone(), found.lo.clone()
            open_ = (found.hi & ~found.lo).nonzero().view(-1)
            if len(open_):
                one[open_], every[open_] = finer._evaluated(_chosen(pieces, open_))
            some[parent[one]] = True
            all_[parent[~every]] = False
        return some, all_

    def _looked_at(self, blocks: _Boxes, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self._attended(chunk, q, kv) for chunk in self._chunks(blocks, len(q) * len(kv))]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    @property
    def _elements_at_once(self) -> int:
        bytes_each = 48 + sum(TORCH_DTYPE[n.dtype].itemsize for n in self.nodes)
        return max(1, min(_CHUNK, self.memory // (2 * bytes_each)))

    def _chunks(self, blocks: _Boxes, elements: int) -> Iterator[_Boxes]:
        n = max(1, self._elements_at_once // elements)
        for i in range(0, len(blocks.lead), n):
            yield _Boxes(*(t[i : i + n] for t in blocks))

    def _attended(self, blocks: _Boxes, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Whether some, and whether all, of the elements at offsets `q` and `kv` of each block are attended."""
        if len(blocks.lead) == 1 and len(q) * len(kv) > 2 * self._elements_at_once:
            # A block that is too large to be evaluated at once.
            half = max(1, len(q) // 2)
            cuts = (
                [(q[:half], kv), (q[half:], kv)] if len(q) > 1 else [(q, kv[: len(kv) // 2]), (q, kv[len(kv) // 2 :])]
            )
            one, two = (self._attended(blocks, *cut) for cut in cuts)
            return one[0] | two[0], one[1] & two[1]
        H = self.shape[1]
        # Beyond the end the last row, or column, stands once more.
        q_idx = (blocks.row.view(-1, 1, 1) * self.size[0] + q.view(1, -1, 1)).clamp_max(self.shape[2] - 1)
        kv_idx = (blocks.column.view(-1, 1, 1) * self.size[1] + kv.view(1, 1, -1)).clamp_max(self.shape[3] - 1)
        lead = {"b": blocks.lead // H, "h": blocks.lead % H}
        named = {n: t.view(-1, 1, 1).to(torch.int32) for n, t in lead.items()}
        named |= {"q_idx": q_idx.to(torch.int32), "kv_idx": kv_idx.to(torch.int32)}
        (keep,) = evaluate([self.mask], self.inputs.fork(named), Pool(self.inputs.device))
        keep = keep.expand(len(blocks.lead), len(q), len(kv)).reshape(len(blocks.lead), -1)
        return keep.any(1), keep.all(1)


def _chosen(boxes: _Boxes, which: Tensor) -> _Boxes:
    return _Boxes(*(t[which] for t in boxes))
