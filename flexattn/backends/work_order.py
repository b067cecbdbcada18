"""In which order a GPU gets its programs: heads that share the cache together, the longest rows of blocks first.

The order changes no result. What a block mask says of its rows is read once and kept with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..templates.arguments import Order
from .kept import kept
from .kernel_lists import transposed
from .recording import step


class Device(NamedTuple):
    """What counts of a GPU: multiprocessors, and bytes of the cache that they share."""

    processors: int
    cache: int


class KeyTiles(NamedTuple):
    """What programs that own keys have in common: how many blocks of keys there are, and for whom each program works.

    group, sharing: query heads and batch entries that read the same keys; splits: parts that these are divided into.
    """

    columns: int
    group: int
    sharing: int
    splits: int


USUAL = Device(132, 50 * 2**20)  # an H200, for kernels that are compiled or interpreted without a GPU
CACHE_SHARE = 0.75  # of the cache for what programs read in common; the rest is for what they write
WAVES = 2  # programs for each multiprocessor, below which the heads of a group are divided
KEYS = 128  # of a program, for counting them before the configuration is known


@lru_cache
def device(where: torch.device) -> Device:
    """The device of a tensor."""
    if where.type != "cuda":
        return USUAL
    properties = torch.cuda.get_device_properties(where)
    return Device(properties.multi_processor_count, properties.L2_cache_size or USUAL.cache)


def together(group: int, shared_bytes: int, heads: int, where: torch.device) -> int:
    """How many of `heads` query heads, those of all batch entries, take turns.

    `group` of them read the same `shared_bytes`.
    """
    room = int(CACHE_SHARE * device(where).cache) // max(1, shared_bytes)
    fitting = 1 << (room.bit_length() - 1) if room else 1
    return max(1, min(heads, group * fitting))


def splits(S: int, kv_heads: int, group: int, where: torch.device) -> int:
    """Into how many programs the `group` of heads that read the same keys is divided, so that none is idle.

    `kv_heads` counts those of all batch entries.
    """
    programs = -(-S // KEYS) * kv_heads
    return max(1, min(group, WAVES * device(where).processors // max(1, programs)))


def longest_first(block_mask: Sequence[Tensor], tiles: int, tiles_of_block: int, keys: KeyTiles | None = None) -> Order:
    """The tiles of each row of the block lists, those whose blocks are most first. A CUDA graph sorts them at each replay.

    Tiles are those of queries, or if given of `keys`.
    """
    (order,) = step(_order, block_mask, tiles, tiles_of_block, keys)
    many_b, many_h = order.shape[0] > 1, order.shape[1] > 1
    return Order(order, order.stride(0) if many_b else 0, order.stride(1) if many_h else 0)


def _order(block_mask: Sequence[Tensor], tiles: int, tiles_of_block: int, keys: KeyTiles | None) -> tuple[Tensor, ...]:
    def found() -> tuple[Tensor, ...]:
        lists = block_mask if keys is None else transposed(block_mask, keys.columns)
        work: Tensor = lists[0] if len(lists) < 4 else lists[0] + lists[2]
        if keys is not None and keys.group > 1 and work.shape[1] > 1:
            work = work.unflatten(1, (-1, keys.group)).sum(2)
        if keys is not None and keys.sharing > 1:
            work = work.sum(0, keepdim=True)
        work = work.repeat_interleave(tiles_of_block, -1)[..., :tiles]
        order = torch.argsort(work, dim=-1, descending=True, stable=True).to(torch.int32)
        if keys is not None and order.shape[0] > 1:
            order = order.repeat_interleave(keys.splits, 0)
        return (order.contiguous(),)

    return kept("order", block_mask, (tiles, tiles_of_block, keys), found)
