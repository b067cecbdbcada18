"""The lists of a block mask, by query block and by key block, and what follows from them alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .block_lists import by_column, dense, visited_elements

LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")


class _Columns(NamedTuple):
    """Lists by key block, and the lists by query block that they were made from."""

    num_blocks: Tensor
    indices: Tensor
    by_key: tuple[Tensor, Tensor]


class ListedBlocks:
    """What a block mask knows without its mask_mod; see `BlockMask` for the fields."""

    seq_lengths: tuple[int, int]
    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor | None
    full_kv_indices: Tensor | None
    BLOCK_SIZE: tuple[int, int]
    _columns: dict[str, _Columns]

    def kv_lists(self) -> tuple[Tensor, ...]:
        """The lists as the operators take them: partial, then full if there are any."""
        if self.full_kv_num_blocks is None or self.full_kv_indices is None:
            return self.kv_num_blocks, self.kv_indices
        return self.kv_num_blocks, self.kv_indices, self.full_kv_num_blocks, self.full_kv_indices

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Q_LEN, KV_LEN)."""
        return (self.kv_num_blocks.shape[0], self.kv_num_blocks.shape[1], *self.seq_lengths)

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.kv_num_blocks.device

    @property
    def q_num_blocks(self) -> Tensor:
        """[B, H, columns] int32: how many query blocks attend partially to each key block."""
        return self._by_key("kv")[0]

    @property
    def q_indices(self) -> Tensor:
        """[B, H, columns, rows] int32: which ones."""
        return self._by_key("kv")[1]

    @property
    def full_q_num_blocks(self) -> Tensor | None:
        """As `q_num_blocks`, for full blocks."""
        return None if self.full_kv_num_blocks is None else self._by_key("full_kv")[0]

    @property
    def full_q_indices(self) -> Tensor | None:
        """As `q_indices`, for full blocks."""
        return None if self.full_kv_num_blocks is None else self._by_key("full_kv")[1]

    def _by_key(self, kind: str) -> tuple[Tensor, Tensor]:
        count, index = getattr(self, f"{kind}_num_blocks"), getattr(self, f"{kind}_indices")
        known = self._columns.get(kind)
        # The fields can be set: lists made from others than today's are stale.
        if known is None or known.num_blocks is not count or known.indices is not index:
            known = self._columns[kind] = _Columns(count, index, by_column(count, index, self._grid()[1]))
        return known.by_key

    def _grid(self) -> tuple[int, int]:
        return -(-self.seq_lengths[0] // self.BLOCK_SIZE[0]), -(-self.seq_lengths[1] // self.BLOCK_SIZE[1])

    def _dense(self, count: Tensor, index: Tensor) -> Tensor:
        return dense(count, index, self._grid()[1])

    def to_dense(self) -> Tensor:
        """[B, H, rows, columns] int32: 1 where a block is listed, partial or full."""
        lists = self.kv_lists()
        dense = self._dense(lists[0], lists[1])
        for count, index in zip(lists[2::2], lists[3::2], strict=True):
            dense = dense | self._dense(count, index)
        return dense.to(torch.int32)

    def numel(self) -> int:
        """Elements of the whole mask, B * H * Q_LEN * KV_LEN."""
        return math.prod(self.shape)

    def sparsity(self) -> float:
        """Percentage of elements in blocks that are skipped, 0 to 100; short blocks count with their true size."""
        if self.numel() == 0:
            return 0.0
        return 100.0 * (1.0 - visited_elements(self.kv_lists(), self.seq_lengths, self.BLOCK_SIZE) / self.numel())
