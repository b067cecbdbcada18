"""The order of work of a blocked backend: block lists in, tiles of query rows with the key ranges they attend to out.

Adjacent key blocks of one kind are joined into one span, consecutive query blocks with the same spans into one tile,
and batch entries or heads with equal lists into one group. A group is split into what stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

MAX_TILE_ROWS = 512
TILE_ELEMENTS = 1 << 19  # scores held at a time: with two buffers of fp32 they stay in a core's share of the cache
MIN_WIDTH = 256  # keys; narrower products run far below the processor's rate


class Span(NamedTuple):
    """Keys `start` to `stop`; `partial` where the mask decides element by element."""

    start: int
    stop: int
    partial: bool


class Tile(NamedTuple):
    """Query rows `start` to `stop`, which all attend to `spans`, in ascending order."""

    start: int
    stop: int
    spans: tuple[Span, ...]

    @property
    def columns(self) -> int:
        return sum(s.stop - s.start for s in self.spans)


class Group(NamedTuple):
    """Batch entries and query heads that share their tiles. `head_stop - head_start` is one head, or all of them."""

    batch_start: int
    batch_stop: int
    head_start: int
    head_stop: int
    tiles: tuple[Tile, ...]


class Split(NamedTuple):
    """Some batch entries and key/value heads of a group: the unit of a batched matrix product of N = nb * nh entries."""

    kv_batches: slice
    batches: slice
    kv_heads: slice
    heads: slice
    lead: tuple[int, int, int]  # nb, nh, G


def schedule(
    block_mask: Sequence[Tensor], block_size: tuple[int, int], shape: tuple[int, int, int, int], max_rows: int
) -> tuple[Group, ...]:
    """The groups of an attention of `shape` (B, Hq, L, S).

    `block_mask` holds kv_num_blocks, kv_indices and, if there are full blocks, full_kv_num_blocks, full_kv_indices,
    each with a batch and head size of 1 or B and Hq; empty, everything is attended. Query blocks are joined up to
    `max_rows` rows.
    """
    B, H, L, S = shape
    if B == 0 or H == 0:
        return ()
    if not block_mask:
        spans = (Span(0, S, True),) if S else ()
        tiles = tuple(Tile(q, min(q + max_rows, L), spans) for q in range(0, L, max_rows))
        return (Group(0, B, 0, H, tiles),)
    lists = [t.cpu() for t in block_mask]
    by_batch, by_head = _differs_along(0, lists), _differs_along(1, lists)
    groups = []
    for b in range(lists[0].shape[0] if by_batch else 1):
        for h in range(lists[0].shape[1] if by_head else 1):
            tiles = _tiles([t[b, h] for t in lists], block_size, L, S, max_rows)
            batches = (b, b + 1) if by_batch else (0, B)
            heads = (h, h + 1) if by_head else (0, H)
            groups.append(Group(*batches, *heads, tiles))
    return tuple(groups)


def _differs_along(dim: int, lists: Sequence[Tensor]) -> bool:
    """Whether the lists of some batch entry (0) or head (1) differ from the first one's in what counts."""
    for count, index in zip(lists[0::2], lists[1::2], strict=True):
        if count.shape[dim] <= 1:
            continue
        if not torch.equal(count, count.narrow(dim, 0, 1).expand_as(count)):
            return True
        used = torch.arange(index.shape[-1]) < count.unsqueeze(-1)
        index = index.masked_fill(~used, -1).sort(-1).values
        if not torch.equal(index, index.narrow(dim, 0, 1).expand_as(index)):
            return True
    return False


def _tiles(lists: Sequence[Tensor], block_size: tuple[int, int], L: int, S: int, max_rows: int) -> tuple[Tile, ...]:
    """Tiles of one batch entry and head. Rows that attend to nothing have a tile without spans."""
    block_q, block_kv = block_size
    counts = [t.tolist() for t in lists[0::2]]
    indices = [t.tolist() for t in lists[1::2]]
    tiles: list[Tile] = []
    for row, start in enumerate(range(0, L, block_q)):
        stop = min(start + block_q, L)
        blocks = sorted(
            (block, kind == 0)
            for kind, (count, index) in enumerate(zip(counts, indices, strict=True))
            for block in index[row][: count[row]]
        )
        spans = _spans(blocks, block_kv, S)
        last = tiles[-1] if tiles else None
        if last is not None and last.spans == spans and stop - last.start <= max_rows:
            tiles[-1] = Tile(last.start, stop, spans)
        else:
            tiles.append(Tile(start, stop, spans))
    return tuple(tiles)


def _spans(blocks: Sequence[tuple[int, bool]], block_kv: int, S: int) -> tuple[Span, ...]:
    spans: list[Span] = []
    for block, partial in blocks:
        start, stop = block * block_kv, min((block + 1) * block_kv, S)
        if spans and spans[-1].stop == start and spans[-1].partial == partial:
            spans[-1] = Span(spans[-1].start, stop, partial)
        else:
            spans.append(Span(start, stop, partial))
    return tuple(spans)


@lru_cache(maxsize=256)
def chunks(spans: tuple[Span, ...], width: int) -> tuple[tuple[Span, ...], ...]:
    """`spans` cut and packed into chunks of at most `width` keys, so that a chunk is one matrix product."""
    result: list[tuple[Span, ...]] = []
    current: list[Span] = []
    room = width
    for span in spans:
        start = span.start
        while start < span.stop:
            stop = min(span.stop, start + room)
            current.append(Span(start, stop, span.partial))
            room -= stop - start
            start = stop
            if room == 0:
                result.append(tuple(current))
                current, room = [], width
    if current:
        result.append(tuple(current))
    return tuple(result)


class Leg(NamedTuple):
    """A group, and how it is split."""

    group: Group
    splits: tuple[Split, ...]


def legs(
    block_mask: Sequence[Tensor],
    block_size: tuple[int, int],
    shape: tuple[int, int, int, int],
    group_size: int,
    shared: bool,
) -> tuple[Leg, ...]:
    """The groups of an attention of `shape` (B, Hq, L, S), split. `shared`: whether the batch has one key and value."""
    groups = schedule(block_mask, block_size, shape, max(128, MAX_TILE_ROWS // group_size))
    if shared and shape[0]:
        # One entry at a time, rather than a copy of K and V for each.
        groups = tuple(
            g._replace(batch_start=b, batch_stop=b + 1) for g in groups for b in range(g.batch_start, g.batch_stop)
        )
    return tuple(Leg(g, tuple(_splits(g, group_size, shared))) for g in groups)


@lru_cache(maxsize=256)
def everything(
    block_size: tuple[int, int], shape: tuple[int, int, int, int], group_size: int, shared: bool
) -> tuple[Leg, ...]:
    return legs((), block_size, shape, group_size, shared)


def _splits(group: Group, size: int, shared: bool) -> Iterator[Split]:
    """Slices of a group whose tiles stay in the cache: as many heads, then batch entries, as fit."""
    single = group.head_stop - group.head_start == 1 and size > 1
    first = group.head_start // size
    last = first + 1 if single else -(-group.head_stop // size)
    area = max(((t.stop - t.start) * min(t.columns, width(t, size)) for t in group.tiles), default=1)
    entries = max(1, TILE_ELEMENTS // max(1, area * (1 if single else size)))
    step, batch_step = max(1, min(entries, last - first)), max(1, entries // max(1, last - first))
    for b in range(group.batch_start, group.batch_stop, batch_step):
        batches = slice(b, min(b + batch_step, group.batch_stop))
        for start in range(first, last, step):
            kv = slice(start, min(start + step, last))
            heads = slice(group.head_start, group.head_stop) if single else slice(kv.start * size, kv.stop * size)
            lead = batches.stop - b, kv.stop - start, 1 if single else size
            yield Split(slice(0, 1) if shared else batches, batches, kv, heads, lead)


def width(tile: Tile, group_size: int) -> int:
    """Keys of a matrix product: short tiles take wider chunks."""
    rows = max(1, (tile.stop - tile.start) * group_size)
    return min(1024 if rows >= 128 else 1 << 14, max(MIN_WIDTH, TILE_ELEMENTS // rows // 2))
