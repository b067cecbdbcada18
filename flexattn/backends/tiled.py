"""FlashAttention-2 in torch operators: rows of blocks in, online softmax over chunks of keys, no S x S memory.

Any device and floating dtype, forward and backward. One matrix product serves all heads of a chunk; K and V are never
repeated for grouped heads; empty blocks are skipped and full blocks are not masked. The softmax runs in base 2, with
log2(e) folded into the query's scale where the score is not modified, or only by an added bias.

Method: Dao, "FlashAttention-2", 2023 (arXiv 2307.08691), algorithms 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..codegen.evaluate import TORCH_DTYPE, Inputs, Pool, evaluate
from ..codegen.ir import Node, Op
from ..codegen.pipeline import Variant
from ..layout import empty_like_strides
from ..problem import Problem
from .schedule import MAX_TILE_ROWS, Group, Span, Tile, chunks, schedule

LOG2E = 1 / math.log(2)
TILE_ELEMENTS = 1 << 19  # scores held at a time: with two buffers of fp32 they stay in a core's share of the cache
MIN_WIDTH = 256  # keys; narrower products run far below the processor's rate


class Forward(NamedTuple):
    """out [B, Hq, L, Ev] in the query's dtype; lse and max_scores [B, Hq, L] in the score dtype."""

    out: Tensor
    lse: Tensor
    max_scores: Tensor


def additive_bias(variant: Variant) -> Node | None:
    """`bias`, where the modified score is `score + bias` and the bias does not depend on the score."""
    node = variant.unscaled
    if node.op is Op.ADD:
        for score, bias in ((node.lhs, node.rhs), (node.rhs, node.lhs)):
            if score.op is Op.INPUT and score.value == "score" and "score" not in bias.axes:
                return bias
    return None


@dataclass
class Part:
    """Some batch entries and key/value heads of a group: the unit of a batched matrix product of N = nb * nh entries."""

    kv_batches: slice
    batches: slice
    kv_heads: slice
    heads: slice
    lead: Sequence[int]  # nb, nh, G
    k: Tensor  # [N, S, E], the compute dtype
    v: Tensor  # [N, S, Ev]
    inputs: Inputs

    def rows(self, x: Tensor, tile: Tile) -> Tensor:
        """Rows of a tensor [B, Hq, L, D], as [N, G * rows, D] in the compute dtype."""
        nb, nh, group = self.lead
        picked = x[self.batches, self.heads, tile.start : tile.stop]
        return picked.to(self.k.dtype).reshape(nb * nh, group * (tile.stop - tile.start), x.shape[-1])

    def put(self, target: Tensor, tile: Tile, source: Tensor) -> None:
        """The inverse of `rows`."""
        nb, nh, group = self.lead
        place = target[self.batches, self.heads, tile.start : tile.stop]
        place.copy_(source.view(nb, nh * group, tile.stop - tile.start, *source.shape[2:]))


@dataclass
class Chunk:
    """Keys that one matrix product covers: `spans` in the order of their columns."""

    spans: tuple[Span, ...]
    inputs: Inputs  # with q_idx and kv_idx of this chunk
    keep: list[tuple[int, int, Tensor]] = field(default_factory=list)  # columns from, to, and their mask

    @property
    def width(self) -> int:
        return sum(s.stop - s.start for s in self.spans)

    def columns(self, x: Tensor) -> Tensor:
        """The chunk's rows of K or V [N, S, D]: a view if the keys are contiguous."""
        ranges = merged(self.spans)
        if len(ranges) == 1:
            return x[:, ranges[0][0] : ranges[0][1]]
        return torch.cat([x[:, a:b] for a, b in ranges], dim=1)


def merged(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """Contiguous key ranges, whatever the kind of their blocks."""
    ranges: list[tuple[int, int]] = []
    for span in spans:
        if ranges and ranges[-1][1] == span.start:
            ranges[-1] = (ranges[-1][0], span.stop)
        else:
            ranges.append((span.start, span.stop))
    return ranges


class Walk:
    """The journey over the tiles of a problem that forward and backward share."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.variant = problem.variant
        self.dtype = TORCH_DTYPE[problem.variant.score_dtype]
        self.device = problem.query.device
        self.pool = Pool(self.device)
        self.bias = additive_bias(problem.variant)
        self.linear = self.bias is not None or not problem.variant.modifies_score
        # With a linear mod the product already is in units of log2.
        self.q_scale = problem.scale * (LOG2E if self.linear else 1.0)
        self.group_size = max(1, problem.query.shape[1] // max(1, problem.key.shape[1]))

    def groups(self) -> tuple[Group, ...]:
        p = self.problem
        B, H, L, _ = p.query.shape
        rows = max(128, MAX_TILE_ROWS // self.group_size)
        groups = schedule(p.block_mask, p.block_size, (B, H, L, p.key.shape[2]), rows)
        if p.key.shape[0] == B or B == 0:
            return groups
        # Keys shared by the batch: one entry at a time, rather than a copy of K and V for each.
        return tuple(
            g._replace(batch_start=b, batch_stop=b + 1) for g in groups for b in range(g.batch_start, g.batch_stop)
        )

    def parts(self, group: Group) -> Iterator[Part]:
        """Slices of a group whose tiles stay in the cache: as many heads, then batch entries, as fit."""
        p, size = self.problem, self.group_size
        single = group.head_stop - group.head_start == 1 and size > 1
        first = group.head_start // size
        last = first + 1 if single else -(-group.head_stop // size)
        area = max(((t.stop - t.start) * min(t.columns, self.width(t)) for t in group.tiles), default=1)
        entries = max(1, TILE_ELEMENTS // max(1, area * (1 if single else size)))
        step, batch_step = max(1, min(entries, last - first)), max(1, entries // max(1, last - first))
        for b in range(group.batch_start, group.batch_stop, batch_step):
            batches = slice(b, min(b + batch_step, group.batch_stop))
            kv_batches = batches if p.key.shape[0] != 1 else slice(0, 1)
            for start in range(first, last, step):
                kv = slice(start, min(start + step, last))
                heads = slice(group.head_start, group.head_stop) if single else slice(kv.start * size, kv.stop * size)
                q = p.query[batches, heads].unflatten(1, (kv.stop - kv.start, 1 if single else size))
                k, v = (t[kv_batches, kv].to(self.dtype).flatten(0, 1) for t in (p.key, p.value))
                yield Part(kv_batches, batches, kv, heads, q.shape[:3], k, v, self._inputs(batches, heads, q.shape[:3]))

    def width(self, tile: Tile) -> int:
        """Keys of a matrix product: short tiles take wider chunks."""
        rows = max(1, (tile.stop - tile.start) * self.group_size)
        return min(1024 if rows >= 128 else 1 << 14, max(MIN_WIDTH, TILE_ELEMENTS // rows // 2))

    def _inputs(self, batches: slice, heads: slice, lead: Sequence[int]) -> Inputs:
        p = self.problem
        b = torch.arange(batches.start, batches.stop, dtype=torch.int32, device=self.device)
        h = torch.arange(heads.start, heads.stop, dtype=torch.int32, device=self.device)
        named = {"b": b.view(-1, 1, 1, 1, 1), "h": h.view(1, lead[1], lead[2], 1, 1)}
        return Inputs(named, p.tensors, p.floats, p.ints, self.device)

    def chunks(self, part: Part, tile: Tile) -> Iterator[Chunk]:
        """The chunks of a tile's keys, with the masks of their partial columns."""
        q_idx = torch.arange(tile.start, tile.stop, dtype=torch.int32, device=self.device).view(-1, 1)
        for spans in chunks(tile.spans, self.width(tile)):
            pieces = [torch.arange(a, b, dtype=torch.int32, device=self.device) for a, b in merged(spans)]
            kv_idx = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            chunk = Chunk(spans, part.inputs.fork({"q_idx": q_idx, "kv_idx": kv_idx}))
            if self.variant.mask is not None:
                chunk.keep = list(self._masks(self.variant.mask, part, chunk, q_idx, kv_idx))
            yield chunk

    def _masks(
        self, mask: Node, part: Part, chunk: Chunk, q_idx: Tensor, kv_idx: Tensor
    ) -> Iterator[tuple[int, int, Tensor]]:
        column = 0
        for span in chunk.spans:
            stop = column + span.stop - span.start
            if span.partial:
                (keep,) = evaluate([mask], part.inputs.fork({"q_idx": q_idx, "kv_idx": kv_idx[column:stop]}))
                yield column, stop, keep
            column = stop

    def scores(self, part: Part, chunk: Chunk, q: Tensor, k: Tensor) -> Tensor:
        """Raw scores [N, G * rows, W] in a pooled buffer: in log2 units if the mod is linear."""
        out = self.pool.take((q.shape[0], q.shape[1], k.shape[1]), self.dtype)
        return torch.bmm(q, k.mT, out=out)

    def modified(self, part: Part, chunk: Chunk, raw: Tensor) -> Tensor:
        """Modified and masked scores in log2 units, and -inf where masked. `raw` is overwritten if the mod is linear."""
        tile = self.tile_view(part, raw)
        if self.bias is not None:
            (bias,) = evaluate([self.bias], chunk.inputs, self.pool)
            tile.add_(bias, alpha=LOG2E)
            self.pool.give(bias)
            result = raw
        elif self.linear:
            result = raw
        else:
            inputs = chunk.inputs.fork({"score": tile})
            (score,) = evaluate([self.variant.unscaled], inputs, self.pool)
            result = self.pool.take(raw.shape, self.dtype)
            torch.mul(score.expand(tile.shape), LOG2E, out=self.tile_view(part, result))
            self.pool.give(score)
        if self.variant.modifies_score:
            self.cut(part, chunk, result, float("-inf"))
            return result
        # Products of finite numbers: adding -inf hides them, at a fifth of the cost of choosing.
        for start, stop, keep in chunk.keep:
            hidden = torch.zeros(keep.shape, dtype=self.dtype, device=self.device).masked_fill_(~keep, float("-inf"))
            tile[..., start:stop] += hidden
        return result

    def cut(self, part: Part, chunk: Chunk, x: Tensor, value: float) -> None:
        """`x[masked] = value`, in place."""
        tile = self.tile_view(part, x)
        fill = torch.full((), value, dtype=x.dtype, device=x.device)
        for start, stop, keep in chunk.keep:
            place = tile[..., start:stop]
            torch.where(keep, place, fill, out=place)

    def tile_view(self, part: Part, x: Tensor) -> Tensor:
        """[N, G * rows, W] as [nb, nh, G, rows, W], the shape that index tensors broadcast to."""
        nb, nh, group = part.lead
        return x.view(nb, nh, group, -1, x.shape[-1])


def forward(problem: Problem) -> Forward:
    """Output, lse and row maxima of the modified scores."""
    walk = Walk(problem)
    B, H, L, _ = problem.query.shape
    out = empty_like_strides(problem.query, problem.value.shape[-1])
    lse = torch.empty(B, H, L, dtype=walk.dtype, device=walk.device)
    max_scores = torch.empty_like(lse)
    for group in walk.groups():
        for part in walk.parts(group):
            for tile in group.tiles:
                _forward_tile(walk, part, tile, out, lse, max_scores)
    return Forward(out, lse, max_scores)


def _forward_tile(walk: Walk, part: Part, tile: Tile, out: Tensor, lse: Tensor, max_scores: Tensor) -> None:
    q = part.rows(walk.problem.query, tile).mul(walk.q_scale)
    m_i: Tensor | None = None
    for chunk in walk.chunks(part, tile):
        k, v = chunk.columns(part.k), chunk.columns(part.v)
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
        where = (part.batches, part.heads, slice(tile.start, tile.stop))
        out[where] = 0
        lse[where] = max_scores[where] = float("-inf")
        return
    nothing = l_i == 0
    part.put(out, tile, acc.div_(l_i.masked_fill(nothing, 1.0)))
    part.put(lse, tile, (torch.log2(l_i) + m_i).mul_(1 / LOG2E).masked_fill_(nothing, float("-inf")).squeeze(-1))
    part.put(max_scores, tile, m_i.mul(1 / LOG2E).masked_fill_(nothing, float("-inf")).squeeze(-1))
