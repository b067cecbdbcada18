"""Where a mask attends at all: nowhere by proof, or the first element and how many there are, exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..capture import check_mask_reach
from ..codegen.ir import walk
from ..codegen.prove import never
from ..codegen.tiles import DEFAULT_MEMORY
from ..create import create_block_mask
from .traced_mask import MaskMod, Shape, TracedMask

_LARGEST_BLOCK, _SMALLEST_BLOCK = 128, 16
_BLOCKS_A_SIDE = 24  # that a short mask is cut into, so that its picture shows something
_CHUNK = 1 << 22  # elements looked at at once


class Element(NamedTuple):
    """An element of a mask."""

    b: int
    h: int
    q_idx: int
    kv_idx: int


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        proved: whether the mask is empty for every shape, by algebra.
        count: how many elements of the shape are attended.
        first: the first of them, in the order (b, h, q_idx, kv_idx).
        blocks: the mask in blocks, where it is not empty.
    """

    proved: bool
    count: int
    first: Element | None
    blocks: BlockMask | None


class _Places(NamedTuple):
    """Blocks by entry of the batch, head, row and column, int64 [N] each."""

    b: Tensor
    h: Tensor
    row: Tensor
    column: Tensor


def search(
    mask_mod: MaskMod,
    shape: Shape,
    device: torch.device,
    memory: int = DEFAULT_MEMORY,
    unsaid: Mapping[str, str] = MappingProxyType({}),
) -> Found:
    """Find where `mask_mod` attends, for a `shape` (B, H, Q_LEN, KV_LEN), in about `memory` bytes.

    `unsaid` has what to give for "b" and "h" where the caller took a size for granted: raises `ValueError` if it matters.
    """
    traced = TracedMask.of(mask_mod, device).merged()
    proved = never(traced.node)
    if 0 in shape or (proved and not traced.may_wrap(shape, memory // 4)):
        return Found(proved, 0, None, None)
    size = tuple(min(_LARGEST_BLOCK, max(_SMALLEST_BLOCK, 1 << (n // _BLOCKS_A_SIDE).bit_length())) for n in shape[2:])
    try:
        blocks = create_block_mask(
            traced.mask_mod, *shape, device=device, BLOCK_SIZE=(size[0], size[1]), max_memory=memory
        )
    except IndexError:
        check_mask_reach(mask_mod, shape, device)  # which has the names of its tensors
        raise
    work = _Search(traced, blocks, shape, memory)
    count = work.count()
    for name in unsaid if not count and not proved else ():
        if name in traced.node.axes:
            what = {"b": "batch entry b", "h": "head h"}[name]
            raise ValueError(f"the mask depends on the {what}, and only one was looked at; give {unsaid[name]}")
    return Found(proved and count == 0, count, work.first() if count else None, blocks if count else None)


class _Search:
    """A search in a mask whose blocks are known."""

    def __init__(self, mask: TracedMask, blocks: BlockMask, shape: Shape, memory: int) -> None:
        self.mask, self.blocks, self.shape = mask, blocks, shape
        lists = blocks.kv_lists()
        self.partial, self.full = _places(lists[0], lists[1]), _places(lists[2], lists[3])
        bytes_each = 8 * (sum(1 for _ in walk(mask.node)) + 8)
        elements = min(_CHUNK, memory // bytes_each)
        self.at_once = max(1, elements // (blocks.BLOCK_SIZE[0] * blocks.BLOCK_SIZE[1]))

    def count(self) -> int:
        rows, columns = (self._sizes(axis)[place] for axis, place in ((0, self.full.row), (1, self.full.column)))
        total = int((rows * columns).sum())
        for places in self._chunks(self.partial):
            total += int(self._attended(places)[0].sum())
        # What is the same for all entries of the batch, or all heads, is listed once.
        listed = self.blocks.kv_num_blocks.shape
        return total * (self.shape[0] // listed[0]) * (self.shape[1] // listed[1])

    def first(self) -> Element:
        """The first element; there is one."""
        lists = self.blocks.kv_lists()
        b, h, row = (lists[0] + lists[2]).nonzero()[0].tolist()
        here = [_of_row(places, (b, h, row)) for places in (self.partial, self.full)]
        starts = (row * self.blocks.BLOCK_SIZE[0], here[1].column * self.blocks.BLOCK_SIZE[1])
        best = [(starts[0], int(kv)) for kv in starts[1][:1]]
        for places in self._chunks(here[0]):
            attended, q_idx, kv_idx = self._attended(places)
            q = int(q_idx.expand_as(attended)[attended].min())
            kv = int(kv_idx.expand_as(attended)[attended & (q_idx == q)].min())
            best.append((q, kv))
        return Element(b, h, *min(best))

    def _attended(self, places: _Places) -> tuple[Tensor, Tensor, Tensor]:
        """The elements of blocks, [N, queries, keys] bool, and their indices."""
        steps = [torch.arange(n, device=self.mask.inputs.device) for n in self.blocks.BLOCK_SIZE]
        q_idx = places.row.view(-1, 1, 1) * len(steps[0]) + steps[0].view(1, -1, 1)
        kv_idx = places.column.view(-1, 1, 1) * len(steps[1]) + steps[1]
        inside = (q_idx < self.shape[2]) & (kv_idx < self.shape[3])
        last = q_idx.clamp_max(self.shape[2] - 1), kv_idx.clamp_max(self.shape[3] - 1)
        return self.mask.values(places.b.view(-1, 1, 1), places.h.view(-1, 1, 1), *last) & inside, q_idx, kv_idx

    def _chunks(self, places: _Places) -> Iterator[_Places]:
        for i in range(0, len(places.b), self.at_once):
            yield _Places(*(t[i : i + self.at_once] for t in places))

    def _sizes(self, axis: int) -> Tensor:
        length, size = self.shape[2 + axis], self.blocks.BLOCK_SIZE[axis]
        return (length - torch.arange(0, length, size, device=self.mask.inputs.device)).clamp_max(size)


def _places(count: Tensor, index: Tensor) -> _Places:
    """The blocks of a list, in order of row and column."""
    used = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
    b, h, row, _ = used.nonzero().unbind(-1)
    return _Places(b, h, row, index[used].long())


def _of_row(places: _Places, row: tuple[int, int, int]) -> _Places:
    chosen = (places.b == row[0]) & (places.h == row[1]) & (places.row == row[2])
    return _Places(*(t[chosen] for t in places))
