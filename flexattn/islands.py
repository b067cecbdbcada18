"""The reference under BATCH_INVARIANT: every batch entry, and every island of blocks in it, is a dense problem of its own.

An island is a range of blocks that attend to no block outside, and that no block outside attends to. In the layout of `aligned`
a document is one or more of them, so that the shapes of its matrix products, and with them their bits, are its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .aligned import copied_both_ways
from .block_lists import dense
from .layout import in_order_of
from .problem import Problem
from .reference import Attention, attention


def solve(problem: Problem) -> Attention:
    """As `reference.solve`, with bits that do not depend on other batch entries, or on other islands."""
    if not problem.query.shape[0]:
        return attention(problem)
    query, rows = problem.query, []
    listed = _listed(problem)
    # Split, not sliced: the gradients of the parts are then put together, and nothing is added, not even a zero.
    shared = problem.key.shape[0] == 1
    keys, values = ([t] * len(query) if shared else t.split(1) for t in (problem.key, problem.value))
    entries = zip(query.split(1), keys, values, strict=True)
    for b, (q, k, v) in enumerate(entries):
        kinds = [t[b : b + 1] if t.shape[0] > 1 else t for t in listed]
        ends = _ends(problem, kinds)
        cut = [_lengths(ends, size, t.shape[2]) for size, t in zip(problem.block_size, (q, k), strict=True)]
        parts, rows_before, keys_before = [], 0, 0
        pieces = zip(q.split(cut[0], 2), k.split(cut[1], 2), v.split(cut[1], 2), pairwise(ends), strict=True)
        for q_part, k_part, v_part, (first, stop) in pieces:
            lists = [made for t in kinds for made in _lists(t[:, :, first:stop, first:stop] if len(ends) > 2 else t)]
            part = problem._replace(query=_new(q_part), key=_new(k_part), value=_new(v_part), block_mask=lists)
            made = attention(part, origin=(b, 0, rows_before, keys_before))
            parts.append((copied_both_ways(made.out), copied_both_ways(made.lse), made.max_scores))
            rows_before, keys_before = rows_before + q_part.shape[2], keys_before + k_part.shape[2]
        rows.append([torch.cat(t, 2) for t in zip(*parts, strict=True)])
    out, lse, max_scores = (torch.cat(t) for t in zip(*rows, strict=True))
    return Attention(in_order_of(query, out), lse, max_scores.detach())


def _listed(problem: Problem) -> list[Tensor]:
    """[B', H', rows, columns] bool for partial blocks, and for full ones, if there are lists."""
    columns = -(-problem.key.shape[2] // problem.block_size[1])
    pairs = zip(problem.block_mask[0::2], problem.block_mask[1::2], strict=True)
    return [dense(count, index, columns) for count, index in pairs]


def _ends(problem: Problem, kinds: Sequence[Tensor]) -> list[int]:
    """Where islands begin, in blocks, and the end of the last. One island where rows and columns are not the same blocks."""
    if not kinds or problem.block_size[0] != problem.block_size[1] or problem.query.shape[2] != problem.key.shape[2]:
        return [0, max(1, *(t.shape[-1] for t in kinds), *(t.shape[-2] for t in kinds)) if kinds else 1]
    some = torch.stack([t.any(0).any(0) for t in kinds]).any(0)
    blocks = len(some)
    if not blocks:
        return [0, 1]
    if type(some) is not Tensor:
        raise NotImplementedError(
            "backend='reference' with batch_invariant looks at the block lists, which compiled code does not have yet; compile "
            "backend='tiled' or 'auto'"
        )
    joined = (some | some.mT).tolist()
    ends, reach = [0], 0
    for block in range(blocks):
        if block > reach:
            ends.append(block)
        reach = max(reach, block, *(other for other in range(block, blocks) if joined[block][other]))
    return [*ends, blocks]


def _lengths(ends: Sequence[int], size: int, length: int) -> list[int]:
    """How many elements each island has."""
    if len(ends) == 2:
        return [length]
    return [min(stop * size, length) - first * size for first, stop in pairwise(ends)]


def _lists(listed: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.argsort(listed, dim=-1, descending=True, stable=True).to(torch.int32)
    return listed.sum(-1, dtype=torch.int32), order


def _new(t: Tensor) -> Tensor:
    """A matrix product may round by the strides and the alignment of what it reads."""
    return t.clone(memory_format=torch.contiguous_format)
