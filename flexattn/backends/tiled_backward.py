"""The gradient of the tiled forward: the same walk over tiles, five matrix products a tile, nothing of size S x S.

With P = exp(S - lse), dP = dO V^T and delta = rowsum(dO * O) - dlse, the gradient of the modified score is
dS = P * (dP - delta); the derivative of the mod takes it to the raw score and to the captured tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..codegen.evaluate import evaluate
from ..problem import Problem
from .schedule import Tile
from .tile_sums import Piece, TileSums
from .tiled import LOG2E, Chunk, Part, Walk, merged


class Backward(NamedTuple):
    """Gradients of query, key, value, and of the captured tensors asked for."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dcaptured: list[Tensor]


class _Saved(NamedTuple):
    """Rows [B, Hq, L, .]: lse in log2 units (+inf where nothing is attended), its gradient, the output, and its gradient."""

    lse: Tensor
    dlse: Tensor | None
    out: Tensor
    dout: Tensor


def backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    wanted: Sequence[int],
    apart: bool = False,
) -> Backward:
    """Gradients given the forward's `out` and `lse` and their gradients; `wanted` numbers captured tensors.

    `apart`: as in `Walk`.
    """
    walk = Walk(problem, apart)
    # A row without keys has weight exp2(-inf - inf) = 0 everywhere.
    lse2 = (lse * LOG2E).masked_fill_(lse == float("-inf"), float("inf")).unsqueeze(-1)
    saved = _Saved(lse2, None if dlse is None else dlse.unsqueeze(-1), out, dout)
    dq = torch.zeros(problem.query.shape, dtype=walk.dtype, device=walk.device)
    dk, dv = (torch.zeros(t.shape, dtype=walk.dtype, device=walk.device) for t in (problem.key, problem.value))
    captured = TileSums(problem, wanted, walk.dtype, walk.pool)
    for leg in walk.legs():
        for part in walk.parts(leg):
            split = part.split
            part_dk, part_dv = torch.zeros_like(part.k), torch.zeros_like(part.v)
            for tile in leg.group.tiles:
                _backward_tile(walk, part, tile, saved, dq, part_dk, part_dv, captured)
            dk[split.kv_batches, split.kv_heads] += part_dk.unflatten(0, (-1, split.lead[1])).mul_(problem.scale)
            dv[split.kv_batches, split.kv_heads] += part_dv.unflatten(0, (-1, split.lead[1]))
    return Backward(
        dq.to(problem.query.dtype), dk.to(problem.key.dtype), dv.to(problem.value.dtype), captured.results()
    )


def _backward_tile(
    walk: Walk,
    part: Part,
    tile: Tile,
    saved: _Saved,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    captured: TileSums,
) -> None:
    if not tile.spans:
        return
    query = walk.rows(part, walk.problem.query, tile)
    q = query * walk.q_scale
    do, out, lse = (walk.rows(part, x, tile) for x in (saved.dout, saved.out, saved.lse))
    delta = (out * do).sum(-1, keepdim=True)
    if saved.dlse is not None:
        delta.sub_(walk.rows(part, saved.dlse, tile))
    dq_tile = torch.zeros_like(q)
    for chunk in walk.chunks(part, tile):
        k, v = walk.columns(chunk, part.k), walk.columns(chunk, part.v)
        raw = walk.scores(part, chunk, q, k)
        p = walk.modified(part, chunk, raw).sub_(lse).exp2_()
        _add_columns(dv, chunk, p, do, walk.apart)
        ds = torch.bmm(do, v.mT, out=walk.pool.take(p.shape, p.dtype))
        ds.sub_(delta).mul_(p)
        if p is not raw:
            walk.pool.give(p)
        gradient = _through_mod(walk, part, tile, chunk, raw, ds, captured)
        dq_tile.baddbmm_(gradient, k)
        _add_columns(dk, chunk, gradient, query, walk.apart)
        for buffer in (gradient, ds, raw):
            walk.pool.give(buffer)
    part.put(dq, tile, dq_tile.mul_(walk.problem.scale))


def _add_columns(target: Tensor, chunk: Chunk, weights: Tensor, rows: Tensor, apart: bool) -> None:
    """`target[:, keys of the chunk] += weights^T rows`."""
    ranges = merged(chunk.spans)
    if len(ranges) == 1 and not apart:
        target[:, ranges[0][0] : ranges[0][1]].baddbmm_(weights.mT, rows)
        return
    product = torch.bmm(weights.mT, rows)
    column = 0
    for start, stop in ranges:
        target[:, start:stop] += product[:, column : column + stop - start]
        column += stop - start


def _through_mod(
    walk: Walk, part: Part, tile: Tile, chunk: Chunk, raw: Tensor, ds: Tensor, captured: TileSums
) -> Tensor:
    """The gradient of the raw score, from that of the modified score; captured tensors get theirs on the way."""
    derivative = walk.variant.derivative
    if walk.linear and not captured.graphs:
        return ds
    inputs = chunk.inputs.fork({"score": walk.tile_view(part, raw), "grad": walk.tile_view(part, ds)})
    roots = [] if walk.linear or derivative.score is None else [derivative.score]
    graphs = [*roots, *captured.graphs]
    values = dict(zip(graphs, evaluate(graphs, inputs, walk.pool), strict=True))
    for value in values.values():
        chunk.cut(value, 0.0)  # a derivative may be nan where the mask is False
    captured.add(values, Piece(part.split, (tile.start, tile.stop), merged(chunk.spans)), inputs)
    if walk.linear:
        result = ds
    else:
        result = walk.pool.take(ds.shape, ds.dtype)
        view = walk.tile_view(part, result)
        view.copy_(values[roots[0]]) if roots else view.zero_()
    for value in values.values():
        if value is not inputs.named["grad"]:
            walk.pool.give(value)
    return result
