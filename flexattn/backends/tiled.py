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
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..codegen.evaluate import TORCH_DTYPE, Inputs, Pool, evaluate, steady, wrap_index
from ..codegen.ir import Node, Op, walk
from ..codegen.pipeline import Variant
from ..layout import empty_like_strides
from ..problem import Problem
from .schedule import MAX_TILE_ROWS, Group, Span, Tile, chunks, schedule

LOG2E = 1 / math.log(2)
TILE_ELEMENTS = 1 << 19  # scores held at a time: with two buffers of fp32 they stay in a core's share of the cache
MIN_WIDTH = 256  # keys; narrower products run far below the processor's rate
KEPT_ELEMENTS = 1 << 14  # of values that depend on indices alone: up to so many are kept for the next call


class Forward(NamedTuple):
    """out [B, Hq, L, Ev] in the query's dtype; lse and max_scores [B, Hq, L] in the score dtype."""

    out: Tensor
    lse: Tensor
    max_scores: Tensor


@lru_cache(maxsize=256)
def additive_bias(variant: Variant) -> Node | None:
    """`bias`, where the modified score is `score + bias` and the bias does not depend on the score."""
    node = variant.score
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

    def covers(self, x: Tensor, tile: Tile) -> bool:
        """Whether the tile is all of a tensor [B, Hq, L, ...]."""
        nb, nh, group = self.lead
        return x.shape[:3] == (nb, nh * group, tile.stop - tile.start)

    def rows(self, x: Tensor, tile: Tile) -> Tensor:
        """Rows of a tensor [B, Hq, L, D], as [N, G * rows, D] in the compute dtype."""
        nb, nh, group = self.lead
        if not self.covers(x, tile):
            x = x[self.batches, self.heads, tile.start : tile.stop]
        return _cast(x, self.k.dtype).reshape(nb * nh, group * (tile.stop - tile.start), x.shape[-1])

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
    hidden: Tensor | None = None  # the mask of all columns, as something to add

    @property
    def width(self) -> int:
        return sum(s.stop - s.start for s in self.spans)

    def columns(self, x: Tensor) -> Tensor:
        """The chunk's rows of K or V [N, S, D]: a view if the keys are contiguous."""
        ranges = merged(self.spans)
        if len(ranges) == 1:
            return x[:, ranges[0][0] : ranges[0][1]]
        return torch.cat([x[:, a:b] for a, b in ranges], dim=1)


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


@lru_cache(maxsize=256)
def number(value: float, dtype: torch.dtype) -> Tensor:
    """A 0-d tensor on the CPU, which an operator takes faster than a Python number."""
    return torch.full((), value, dtype=dtype, device="cpu")


class Place(NamedTuple):
    """Where a chunk is: its indices, and what follows from them alone."""

    named: dict[str, Tensor]
    memo: dict[Node, Tensor]
    wrapped: dict[tuple[Node, int], Tensor]
    hidden: Tensor | None  # the mask of the whole chunk as something to add: 0, or -inf


class Corner(NamedTuple):
    """What a `Place` depends on: ranges of the indices, and the number of heads that share a key head."""

    b: tuple[int, int]
    h: tuple[int, int]
    group: int
    q_idx: tuple[int, int]
    kv_idx: tuple[tuple[int, int], ...]
    masked: bool  # whether the mask decides about every key


def place_of(variant: Variant, corner: Corner, device: torch.device, sizes: tuple[tuple[int, ...], ...]) -> Place:
    """The place at a corner; `sizes` are the shapes of the captured tensors."""

    def positions(start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, dtype=torch.int32, device=device)

    pieces = [positions(*piece) for piece in corner.kv_idx]
    named = {
        "b": positions(*corner.b).view(-1, 1, 1, 1, 1),
        "h": positions(*corner.h).view(1, -1, corner.group, 1, 1),
        "q_idx": positions(*corner.q_idx).view(-1, 1),
        "kv_idx": pieces[0] if len(pieces) == 1 else torch.cat(pieces),
    }
    place = Place(named, {}, {}, None)
    roots = [variant.score] + ([variant.mask] if corner.masked and variant.mask is not None else [])
    found = steady(roots)
    elements = sum(math.prod(named[str(axis)].numel() for axis in node.axes) for node in found)
    if not found or device.type != "cpu" or elements > KEPT_ELEMENTS:
        return place
    inputs = Inputs(named, device=device, memo=place.memo)
    evaluate(found, inputs)
    for node in walk(*roots):
        if node.op is Op.LOAD and len(node.args) == 2 and node.args[1] in place.memo:
            base, index = node.args
            assert isinstance(base.value, tuple)
            (size,) = sizes[base.value[0]]
            place.wrapped[index, size] = wrap_index(place.memo[index], size)
    if variant.mask is None or variant.modifies_score or variant.mask not in place.memo:
        return place
    keep, dtype = place.memo[variant.mask], TORCH_DTYPE[variant.score_dtype]
    return place._replace(hidden=_hidden(keep, dtype))


_kept_place = lru_cache(maxsize=128)(place_of)


def _hidden(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `keep`, else -inf."""
    return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill_(~keep, float("-inf"))


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

    def scalar(self, value: float) -> Tensor | float:
        """A number of the compute dtype as operators take it fastest."""
        return number(value, self.dtype) if self.device.type == "cpu" else value

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
                nb, nh = batches.stop - b, kv.stop - start
                k, v = (
                    _cast(t if t.shape[:2] == (nb, nh) else t[kv_batches, kv], self.dtype).flatten(0, 1)
                    for t in (p.key, p.value)
                )
                yield Part(kv_batches, batches, kv, heads, (nb, nh, 1 if single else size), k, v)

    def width(self, tile: Tile) -> int:
        """Keys of a matrix product: short tiles take wider chunks."""
        rows = max(1, (tile.stop - tile.start) * self.group_size)
        return min(1024 if rows >= 128 else 1 << 14, max(MIN_WIDTH, TILE_ELEMENTS // rows // 2))

    def chunks(self, part: Part, tile: Tile) -> Iterator[Chunk]:
        """The chunks of a tile's keys, with the masks of their partial columns."""
        p, mask = self.problem, self.variant.mask
        b, h = (part.batches.start, part.batches.stop), (part.heads.start, part.heads.stop)
        make = _kept_place if self.device.type == "cpu" else place_of
        for spans in chunks(tile.spans, self.width(tile)):
            masked = mask is not None and len(spans) == 1 and spans[0].partial
            corner = Corner(b, h, part.lead[2], (tile.start, tile.stop), merged(spans), masked)
            place = make(self.variant, corner, self.device, tuple(t.shape for t in p.tensors))
            inputs = Inputs(place.named, p.tensors, p.floats, p.ints, self.device, dict(place.memo), None, place.wrapped)
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
            (score,) = evaluate([self.variant.score], inputs, pool)
            result = self.pool.take(raw.shape, self.dtype)
            torch.mul(score.expand(tile.shape), LOG2E, out=self.tile_view(part, result))
            self.pool.give(score)
        if self.variant.modifies_score:
            self.cut(part, chunk, result, float("-inf"))
            return result
        # Products of finite numbers: adding -inf hides them, at a fifth of the cost of choosing.
        for start, stop, keep in chunk.keep:
            hidden = _hidden(keep, self.dtype) if chunk.hidden is None else chunk.hidden[..., start:stop]
            _columns(tile, start, stop).add_(hidden)
        return result

    def cut(self, part: Part, chunk: Chunk, x: Tensor, value: float) -> None:
        """`x[masked] = value`, in place."""
        tile = self.tile_view(part, x)
        fill = self.scalar(value)
        for start, stop, keep in chunk.keep:
            place = _columns(tile, start, stop)
            torch.where(keep, place, fill, out=place)

    def tile_view(self, part: Part, x: Tensor) -> Tensor:
        """[N, G * rows, W] as [nb, nh, G, rows, W], the shape that index tensors broadcast to."""
        nb, nh, group = part.lead
        return x.view(nb, nh, group, -1, x.shape[-1])


def _columns(x: Tensor, start: int, stop: int) -> Tensor:
    return x if start == 0 and stop == x.shape[-1] else x[..., start:stop]


def forward(problem: Problem) -> Forward:
    """Output, lse and row maxima of the modified scores."""
    walk, query = Walk(problem), problem.query
    B, H, L, _ = query.shape
    groups = walk.groups()
    if len(groups) == 1 and len(groups[0].tiles) == 1 and query.is_contiguous():
        part, *others = walk.parts(groups[0])
        if not others:  # a small problem: its only tile is the result
            out, lse, max_scores = _forward_tile(walk, part, groups[0].tiles[0])
            return Forward(_cast(out, query.dtype).view(B, H, L, -1), lse.view(B, H, L), max_scores.view(B, H, L))
    result = Forward(
        empty_like_strides(query, problem.value.shape[-1]),
        torch.empty(B, H, L, dtype=walk.dtype, device=walk.device),
        torch.empty(B, H, L, dtype=walk.dtype, device=walk.device),
    )
    for group in groups:
        for part in walk.parts(group):
            for tile in group.tiles:
                for target, source in zip(result, _forward_tile(walk, part, tile), strict=True):
                    part.put(target, tile, source)
    return result


def _forward_tile(walk: Walk, part: Part, tile: Tile) -> Forward:
    """out [N, G * rows, Ev], lse and max_scores [N, G * rows] of a tile, in the compute dtype."""
    q = part.rows(walk.problem.query, tile).mul(walk.scalar(walk.q_scale))
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
        nothing_at_all = q.new_full(q.shape[:2], float("-inf"))
        return Forward(q.new_zeros(*q.shape[:2], part.v.shape[-1]), nothing_at_all, nothing_at_all.clone())
    unit = walk.scalar(1 / LOG2E)
    lse, max_scores = torch.log2(l_i).add_(m_i).mul_(unit), m_i.mul(unit)
    # Asking the CPU whether a row attends to nothing costs less than to provide for it.
    if not (walk.device.type == "cpu" and l_i.min().item() > 0):
        nothing = l_i == 0
        l_i = l_i.masked_fill(nothing, 1.0)
        lse.masked_fill_(nothing, float("-inf")), max_scores.masked_fill_(nothing, float("-inf"))
    return Forward(acc.div_(l_i), lse.squeeze(-1), max_scores.squeeze(-1))
