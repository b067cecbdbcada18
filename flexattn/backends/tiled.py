"""FlashAttention-2 in torch operators: rows of blocks in, online softmax over chunks of keys, no S x S memory.

Any device and floating dtype, forward and backward. One matrix product serves all heads of a chunk; K and V are never
repeated for grouped heads; empty blocks are skipped and full blocks are not masked. The softmax runs in base 2, with
log2(e) folded into the query's scale where the score is not modified, or only by an added bias.

Method: Dao, "FlashAttention-2", 2023 (arXiv 2307.08691), algorithms 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..codegen.evaluate import TORCH_DTYPE, Inputs, Pool, evaluate
from ..codegen.ir import Node, Op
from ..codegen.pipeline import Variant
from ..codegen.spec import apply
from ..layout import empty_like_strides
from ..problem import Problem
from .indices import Corner, hidden, kept_place_of, number, place_of
from .kept import kept
from .schedule import Leg, Span, Split, Tile, chunks, everything, legs, width
from .schedule_apart import legs_apart

LOG2E = 1 / math.log(2)
KEPT_BLOCKS = (
    1 << 16
)  # entries of block lists: the order of work of longer ones is as large, and costs little beside the work


class Forward(NamedTuple):
    """out [B, Hq, L, Ev] in the query's dtype; lse and max_scores [B, Hq, L] in the score dtype."""

    out: Tensor
    lse: Tensor
    max_scores: Tensor


def additive_bias(variant: Variant) -> Node | None:
    """`bias`, where the modified score is `score + bias` and the bias does not depend on the score."""
    return _bias(variant.unscaled)


@lru_cache(maxsize=256)
def _bias(node: Node) -> Node | None:
    if node.op is Op.SUB:  # the same bits as adding what is negated
        node = apply(Op.ADD, node.lhs, apply(Op.NEG, node.rhs))
    if node.op is Op.ADD:
        for score, bias in ((node.lhs, node.rhs), (node.rhs, node.lhs)):
            if score.op is Op.INPUT and score.value == "score" and "score" not in bias.axes:
                return bias
    return None


@dataclass
class Part:
    """The operands of a `Split`."""

    split: Split
    k: Tensor  # [N, S, E], the compute dtype
    v: Tensor  # [N, S, Ev]

    def covers(self, x: Tensor, tile: Tile) -> bool:
        """Whether the tile is all of a tensor [B, Hq, L, ...]."""
        nb, nh, group = self.split.lead
        return x.shape[:3] == (nb, nh * group, tile.stop - tile.start)

    def rows(self, x: Tensor, tile: Tile) -> Tensor:
        """Rows of a tensor [B, Hq, L, D], as [N, G * rows, D] in the compute dtype."""
        nb, nh, group = self.split.lead
        if not self.covers(x, tile):
            x = x[self.split.batches, self.split.heads, tile.start : tile.stop]
        return _cast(x, self.k.dtype).reshape(nb * nh, group * (tile.stop - tile.start), x.shape[-1])

    def put(self, target: Tensor, tile: Tile, source: Tensor) -> None:
        """The inverse of `rows`."""
        nb, nh, group = self.split.lead
        place = target[self.split.batches, self.split.heads, tile.start : tile.stop]
        place.copy_(source.view(nb, nh * group, tile.stop - tile.start, *place.shape[3:]))


@dataclass
class Chunk:
    """Keys that one matrix product covers: `spans` in the order of their columns."""

    spans: tuple[Span, ...]
    inputs: Inputs  # with q_idx and kv_idx of this chunk
    keep: list[tuple[int, int, Tensor]] = field(default_factory=list)  # columns from, to, and their mask
    hidden: Tensor | None = None  # the mask of all columns, as something to add

    @property
    def width(self) -> int:
        return sum(s.stop - s.start for s in self.spans)

    def columns(self, x: Tensor) -> Tensor:
        """The chunk's rows of K or V [N, S, D]: a view if the keys are contiguous."""
        ranges = merged(self.spans)
        if len(ranges) == 1:
            start, stop = ranges[0]
            return x if start == 0 and stop == x.shape[1] else x[:, start:stop]
        return torch.cat([x[:, a:b] for a, b in ranges], dim=1)

    def cut(self, x: Tensor, value: float) -> None:
        """`x[masked] = value`, in place, for x [nb, nh, G, rows, W]."""
        if not self.keep:
            return
        fill = (
            number(value, x.dtype) if x.device.type == "cpu" else torch.full((), value, dtype=x.dtype, device=x.device)
        )
        for start, stop, keep in self.keep:
            place = _columns(x, start, stop)
            torch.where(keep, place, fill, out=place)


@lru_cache(maxsize=256)
def merged(spans: tuple[Span, ...]) -> tuple[tuple[int, int], ...]:
    """Contiguous key ranges, whatever the kind of their blocks."""
    ranges: list[tuple[int, int]] = []
    for span in spans:
        if ranges and ranges[-1][1] == span.start:
            ranges[-1] = (ranges[-1][0], span.stop)
        else:
            ranges.append((span.start, span.stop))
    return tuple(ranges)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`to`, whose call is what costs where there is nothing to do."""
    return x if x.dtype is dtype else x.to(dtype)


def _copied(x: Tensor) -> Tensor:
    """A matrix product may round by the strides and the alignment of what it reads."""
    return x.clone(memory_format=torch.contiguous_format)


class Walk:
    """The journey over the tiles of a problem that forward and backward share.

    `apart`: every block is computed in the same way whatever else there is, see `schedule_apart`.
    """

    def __init__(self, problem: Problem, apart: bool = False) -> None:
        self.problem, self.apart = problem, apart
        self.variant = problem.variant
        self.dtype = TORCH_DTYPE[problem.variant.score_dtype]
        self.device = problem.query.device
        self.pool = Pool(self.device)
        self.bias = additive_bias(problem.variant)
        self.linear = self.bias is not None or not problem.variant.modifies_score
        # With a linear mod the product already is in units of log2.
        self.q_scale = problem.scale * (LOG2E if self.linear else 1.0)
        self.group_size = max(1, problem.query.shape[1] // max(1, problem.key.shape[1]))

    def scalar(self, value: float) -> Tensor | float:
        """A number of the compute dtype as operators take it fastest."""
        return number(value, self.dtype) if self.device.type == "cpu" else value

    def legs(self) -> tuple[Leg, ...]:
        """The work in its order."""
        p = self.problem
        B, H, L, _ = p.query.shape
        S = p.key.shape[2]
        rest = p.block_size, (B, H, L, S), self.group_size, p.key.shape[0] != B
        if not p.block_mask:
            return legs_apart((), *rest) if self.apart else everything(*rest)
        make = legs_apart if self.apart else legs
        if sum([t.numel() for t in p.block_mask]) > KEPT_BLOCKS:
            return make(p.block_mask, *rest)
        return kept("legs", p.block_mask, (self.apart, *rest), lambda: make(p.block_mask, *rest))

    def part(self, split: Split) -> Part:
        """The keys and values of a split."""
        nb, nh, _ = split.lead
        k, v = self.problem.key, self.problem.value
        if k.shape[0] != nb or k.shape[1] != nh:
            k, v = k[split.kv_batches, split.kv_heads], v[split.kv_batches, split.kv_heads]
        return Part(split, _cast(k, self.dtype).flatten(0, 1), _cast(v, self.dtype).flatten(0, 1))

    def parts(self, leg: Leg) -> Iterator[Part]:
        return map(self.part, leg.splits)

    def chunked(self, tile: Tile) -> tuple[tuple[Span, ...], ...]:
        """The keys of each matrix product."""
        return tuple((s,) for s in tile.spans) if self.apart else chunks(tile.spans, width(tile, self.group_size))

    def rows(self, part: Part, x: Tensor, tile: Tile) -> Tensor:
        """Rows of a tensor [B, Hq, L, D], as [N, G * rows, D] in the compute dtype."""
        found = part.rows(x, tile)
        return _copied(found) if self.apart else found

    def columns(self, chunk: Chunk, x: Tensor) -> Tensor:
        """The chunk's rows of K or V."""
        return _copied(chunk.columns(x)) if self.apart else chunk.columns(x)

    def chunks(self, part: Part, tile: Tile) -> Iterator[Chunk]:
        """The chunks of a tile's keys, with the masks of their partial columns."""
        p, mask, split = self.problem, self.variant.mask, part.split
        b, h = (split.batches.start, split.batches.stop), (split.heads.start, split.heads.stop)
        tensors = p.tensors
        sizes = tuple([t.shape for t in tensors])
        make = kept_place_of if self.device.type == "cpu" else place_of
        for spans in self.chunked(tile):
            masked = mask is not None and len(spans) == 1 and spans[0].partial
            corner = Corner(b, h, split.lead[2], (tile.start, tile.stop), merged(spans), masked)
            place = make(self.variant.text, corner, self.device, sizes)
            inputs = Inputs(place.named, tensors, p.floats, p.ints, self.device, dict(place.memo), None, place.wrapped)
            chunk = Chunk(spans, inputs)
            if mask is not None:
                keep = place.memo.get(mask)
                chunk.keep = list(self._masks(mask, chunk)) if keep is None else [(0, chunk.width, keep)]
                chunk.hidden = place.hidden
            yield chunk

    def _masks(self, mask: Node, chunk: Chunk) -> Iterator[tuple[int, int, Tensor]]:
        column = 0
        for span in chunk.spans:
            stop = column + span.stop - span.start
            if span.partial:
                inputs = chunk.inputs
                if len(chunk.spans) > 1:
                    inputs = inputs.fork({"kv_idx": inputs.named["kv_idx"][column:stop]})
                (keep,) = evaluate([mask], inputs)
                yield column, stop, keep
            column = stop

    def scores(self, part: Part, chunk: Chunk, q: Tensor, k: Tensor) -> Tensor:
        """Raw scores [N, G * rows, W], in a pooled buffer if they are many: in log2 units if the mod is linear."""
        shape = q.shape[0], q.shape[1], k.shape[1]
        if math.prod(shape) < Pool.SMALLEST:
            return torch.bmm(q, k.mT)
        return torch.bmm(q, k.mT, out=self.pool.take(shape, self.dtype))

    def modified(self, part: Part, chunk: Chunk, raw: Tensor) -> Tensor:
        """Modified and masked scores in log2 units, and -inf where masked. `raw` is overwritten if the mod is linear."""
        if self.linear and self.bias is None and not chunk.keep:
            return raw
        tile = self.tile_view(part, raw)
        pool = None if raw.numel() < Pool.SMALLEST else self.pool
        if self.bias is not None:
            (bias,) = evaluate([self.bias], chunk.inputs, pool)
            tile.add_(bias, alpha=LOG2E)
            self.pool.give(bias)
            result = raw
        elif self.linear:
            result = raw
        else:
            inputs = chunk.inputs.fork({"score": tile})
            (score,) = evaluate([self.variant.unscaled], inputs, pool)
            result = self.pool.take(raw.shape, self.dtype)
            torch.mul(score.expand(tile.shape), LOG2E, out=self.tile_view(part, result))
            self.pool.give(score)
        if self.variant.modifies_score:
            chunk.cut(self.tile_view(part, result), float("-inf"))
            return result
        # Products of finite numbers: adding -inf hides them, at a fifth of the cost of choosing.
        for start, stop, keep in chunk.keep:
            added = hidden(keep, self.dtype) if chunk.hidden is None else chunk.hidden
            _columns(tile, start, stop).add_(added)
        return result

    def tile_view(self, part: Part, x: Tensor) -> Tensor:
        """[N, G * rows, W] as [nb, nh, G, rows, W], the shape that index tensors broadcast to."""
        nb, nh, group = part.split.lead
        return x.view(nb, nh, group, -1, x.shape[-1])


def _columns(x: Tensor, start: int, stop: int) -> Tensor:
    return x if start == 0 and stop == x.shape[-1] else x[..., start:stop]


def forward(problem: Problem, apart: bool = False) -> Forward:
    """Output, lse and row maxima of the modified scores. `apart`: as in `Walk`."""
    walk, query = Walk(problem, apart), problem.query
    B, H, L, _ = query.shape
    journey = walk.legs()
    if len(journey) == 1 and len(journey[0].splits) == len(journey[0].group.tiles) == 1 and query.is_contiguous():
        # A small problem: its only tile is the result.
        (part,) = walk.parts(journey[0])
        out, lse, max_scores = _forward_tile(walk, part, journey[0].group.tiles[0])
        return Forward(_cast(out, query.dtype).view(B, H, L, -1), lse.view(B, H, L), max_scores.view(B, H, L))
    result = Forward(
        empty_like_strides(query, problem.value.shape[-1]),
        torch.empty(B, H, L, dtype=walk.dtype, device=walk.device),
        torch.empty(B, H, L, dtype=walk.dtype, device=walk.device),
    )
    for leg in journey:
        for part in walk.parts(leg):
            for tile in leg.group.tiles:
                for target, source in zip(result, _forward_tile(walk, part, tile), strict=True):
                    part.put(target, tile, source)
    return result


def _forward_tile(walk: Walk, part: Part, tile: Tile) -> Forward:
    """out [N, G * rows, Ev], lse and max_scores [N, G * rows, 1] of a tile, in the compute dtype."""
    q = walk.rows(part, walk.problem.query, tile).mul(walk.scalar(walk.q_scale))
    m_i: Tensor | None = None
    for chunk in walk.chunks(part, tile):
        k, v = walk.columns(chunk, part.k), walk.columns(chunk, part.v)
        raw = walk.scores(part, chunk, q, k)
        p = walk.modified(part, chunk, raw)
        # A row masked so far has maximum -inf: the smallest finite number keeps -inf - m from being nan.
        m_ij = p.amax(-1, keepdim=True).clamp_min_(torch.finfo(walk.dtype).min)
        if m_i is None:
            m_i = m_ij
            p.sub_(m_i).exp2_()
            l_i = p.sum(-1, keepdim=True)
            acc = torch.bmm(p, v)
        else:
            m_new = torch.maximum(m_i, m_ij)
            alpha = torch.exp2(m_i.sub_(m_new))
            m_i = m_new
            p.sub_(m_i).exp2_()
            l_i.mul_(alpha).add_(p.sum(-1, keepdim=True))
            acc.mul_(alpha).baddbmm_(p, v)
        if p is not raw:
            walk.pool.give(raw)
        walk.pool.give(p)
    if m_i is None:  # rows that attend to nothing
        nothing_at_all = q.new_full((*q.shape[:2], 1), float("-inf"))
        return Forward(q.new_zeros(*q.shape[:2], part.v.shape[-1]), nothing_at_all, nothing_at_all.clone())
    unit = walk.scalar(1 / LOG2E)
    lse, max_scores = torch.log2(l_i).add_(m_i).mul_(unit), m_i.mul(unit)
    # Asking the CPU whether a row attends to nothing costs less than to provide for it.
    if not (walk.device.type == "cpu" and l_i.min().item() > 0):
        nothing = l_i == 0
        l_i = l_i.masked_fill(nothing, 1.0)
        lse.masked_fill_(nothing, float("-inf")), max_scores.masked_fill_(nothing, float("-inf"))
    return Forward(acc.div_(l_i), lse, max_scores)
