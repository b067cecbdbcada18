"""`BlockMask`: which blocks of the score matrix are attended, as lists, and the mask inside the partial ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .block_lists import block_size, check_lists, dense, last, positions, take
from .block_mask_text import picture
from .mask_object import moved
from .masks import noop_mask
from .shifted_mask import ShiftedMask

MaskMod = Callable[..., Tensor]
DEFAULT_BLOCK_SIZE = 128

_LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")


class BlockMask:
    """A mask as lists of blocks: for each row of query blocks, the key blocks to visit.

    Blocks in `kv_indices` are *partial*: `mask_mod` decides element by element. Blocks in `full_kv_indices` are *full*:
    every element is attended. A block in neither list is empty, whatever `mask_mod` says. Every backend follows the
    lists. Entries of a row past its count mean nothing; a row need not be sorted.

    Attributes:
        seq_lengths: (Q_LEN, KV_LEN); the last block of either may be short.
        kv_num_blocks: [B, H, rows] int32, the number of partial blocks of each row of query blocks.
        kv_indices: [B, H, rows, columns] int32, their positions.
        full_kv_num_blocks, full_kv_indices: the same for full blocks, or None.
        q_num_blocks, q_indices, full_q_num_blocks, full_q_indices: the same lists by key block, made when first asked for.
        BLOCK_SIZE: (queries, keys) of a block.
        mask_mod: function `(b, h, q_idx, kv_idx) -> bool`. It may be replaced.

    B and H are the query's, or 1 where the mask is the same for all. Make one with `create_block_mask` or
    `BlockMask.from_kv_blocks`. The interface is that of `torch.nn.attention.flex_attention.BlockMask`.

    Example:
        >>> import flexattn
        >>> mask = flexattn.create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 512, 512)
        >>> mask.shape, mask.sparsity()
        ((1, 1, 512, 512), 37.5)
        >>> mask[:, :, 2:].shape  # the last two rows of query blocks
        (1, 1, 256, 512)
    """

    seq_lengths: tuple[int, int]
    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor | None
    full_kv_indices: Tensor | None
    BLOCK_SIZE: tuple[int, int]
    mask_mod: MaskMod

    def __init__(
        self,
        seq_lengths: tuple[int, int],
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        full_kv_num_blocks: Tensor | None = None,
        full_kv_indices: Tensor | None = None,
        BLOCK_SIZE: tuple[int, int] = (DEFAULT_BLOCK_SIZE, DEFAULT_BLOCK_SIZE),
        mask_mod: MaskMod | None = None,
    ) -> None:
        self.seq_lengths = seq_lengths
        self.kv_num_blocks, self.kv_indices = kv_num_blocks, kv_indices
        self.full_kv_num_blocks, self.full_kv_indices = full_kv_num_blocks, full_kv_indices
        self.BLOCK_SIZE = BLOCK_SIZE
        self.mask_mod = noop_mask if mask_mod is None else mask_mod
        self._columns: dict[str, _Columns] = {}

    @classmethod
    def from_kv_blocks(
        cls,
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        full_kv_num_blocks: Tensor | None = None,
        full_kv_indices: Tensor | None = None,
        BLOCK_SIZE: int | tuple[int, int] = DEFAULT_BLOCK_SIZE,
        mask_mod: MaskMod | None = None,
        seq_lengths: tuple[int, int] | None = None,
        compute_q_blocks: bool = True,
        *,
        dq_write_order: Tensor | None = None,
        dq_write_order_full: Tensor | None = None,
        dq_kv_order: Any = None,
    ) -> BlockMask:
        """A block mask from its lists.

        Args:
            kv_num_blocks: [B, H, rows] integers.
            kv_indices: [B, H, rows, columns] integers.
            full_kv_num_blocks, full_kv_indices: the same for full blocks; both or neither.
            BLOCK_SIZE: an int, or (queries, keys).
            mask_mod: the mask of partial blocks. None: all of a listed block is attended.
            seq_lengths: (Q_LEN, KV_LEN). Default: as many whole blocks as the lists have rows and columns.
            compute_q_blocks: accepted for PyTorch's sake; lists by key block are made when they are needed.
            dq_write_order, dq_write_order_full, dq_kv_order: accepted and ignored; no kernel here needs them.

        Raises:
            ValueError: for shapes that do not fit together, for lists that are not integers, and for a row that lists a
                block twice, in both lists, or outside the mask (not checked while compiling, nor without data).

        Example:
            >>> import torch, flexattn
            >>> count, index = torch.ones(1, 1, 2, dtype=torch.int32), torch.tensor([[[[0, 1], [1, 0]]]])
            >>> diagonal = flexattn.BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=64)
            >>> diagonal.to_dense().tolist()
            [[[[1, 0], [0, 1]]]]
        """
        size = block_size(BLOCK_SIZE)
        if (full_kv_num_blocks is None) != (full_kv_indices is None):
            raise ValueError("full_kv_num_blocks and full_kv_indices belong together; give both or neither")
        pairs = [("kv", kv_num_blocks, kv_indices)]
        if full_kv_num_blocks is not None and full_kv_indices is not None:
            pairs.append(("full_kv", full_kv_num_blocks, full_kv_indices))
        for name, count, index in pairs:
            if count.dim() != 3 or index.dim() != 4 or index.shape[:3] != count.shape:
                raise ValueError(
                    f"{name}_num_blocks has shape {tuple(count.shape)} and {name}_indices {tuple(index.shape)}; "
                    "they must be [B, H, rows] and [B, H, rows, columns]"
                )
            if any(t.dtype is torch.bool or t.is_floating_point() or t.is_complex() for t in (count, index)):
                raise ValueError(
                    f"{name}_num_blocks is {count.dtype} and {name}_indices {index.dtype}; both must be integers, "
                    "e.g. t.to(torch.int32)"
                )
            if count.shape != kv_num_blocks.shape:
                raise ValueError(
                    f"full blocks have rows {tuple(count.shape)}, partial blocks {tuple(kv_num_blocks.shape)}"
                )
        if seq_lengths is not None and (
            len(seq_lengths) != 2 or any(isinstance(n, int) and n < 0 for n in seq_lengths)
        ):
            raise ValueError(f"seq_lengths is {seq_lengths}; it must be two lengths, (Q_LEN, KV_LEN)")
        rows, columns = kv_indices.shape[2], max(index.shape[3] for _, _, index in pairs)
        lengths = (rows * size[0], columns * size[1]) if seq_lengths is None else (seq_lengths[0], seq_lengths[1])
        if -(-lengths[0] // size[0]) != rows:
            raise ValueError(
                f"Q_LEN {lengths[0]} has {-(-lengths[0] // size[0])} blocks of {size[0]}, the lists have {rows} rows"
            )
        lists = [t for _, count, index in pairs for t in (count, index)]
        if not torch.compiler.is_compiling() and all(_has_data(t) for t in lists):
            # Before the conversion, which would bring an index that is out of range back into it.
            check_lists(lists, -(-lengths[1] // size[1]))
        lists = [t.to(torch.int32) for t in lists]
        full_count, full_index = (lists[2], lists[3]) if len(lists) > 2 else (None, None)
        return cls(lengths, lists[0], lists[1], full_count, full_index, size, mask_mod)

    # ---- views of the same data

    def kv_lists(self) -> tuple[Tensor, ...]:
        """The lists as the operators take them: partial, then full if there are any."""
        if self.full_kv_num_blocks is None or self.full_kv_indices is None:
            return self.kv_num_blocks, self.kv_indices
        return self.kv_num_blocks, self.kv_indices, self.full_kv_num_blocks, self.full_kv_indices

    def with_mask_mod(self, mask_mod: MaskMod | None) -> BlockMask:
        """The same lists with another element mask."""
        made = self._map(lambda t: t)
        made.mask_mod = noop_mask if mask_mod is None else mask_mod
        return made

    def as_tuple(self, flatten: bool = True) -> tuple[Any, ...]:
        """The fields in PyTorch's order; `flatten=False` keeps lengths and block size as pairs.

        The write orders that newer versions of PyTorch put before the block size are left out: there are none here.
        """
        lengths, size = (self.seq_lengths, self.BLOCK_SIZE) if flatten else ((self.seq_lengths,), (self.BLOCK_SIZE,))
        lists = (self.kv_num_blocks, self.kv_indices, self.full_kv_num_blocks, self.full_kv_indices)
        by_key = (self.q_num_blocks, self.q_indices, self.full_q_num_blocks, self.full_q_indices)
        return (*lengths, *lists, *by_key, *size, self.mask_mod)

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
            listed = self._dense(count, index).mT
            order = torch.argsort(listed.int(), dim=-1, descending=True, stable=True).to(torch.int32)
            known = self._columns[kind] = _Columns(count, index, (listed.sum(-1, dtype=torch.int32), order))
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
        rows, columns = (
            (length - torch.arange(0, length, block, device=self.device)).clamp_max(block).double()
            for length, block in zip(self.seq_lengths, self.BLOCK_SIZE, strict=True)
        )
        visited = (self.to_dense().double() * rows.unsqueeze(-1) * columns).sum().item()
        return 100.0 * (1.0 - visited / self.numel())

    # ---- derived masks

    def __getitem__(self, index: Any) -> BlockMask:
        """The mask of some batch entries, heads and rows of query blocks, in this order. An int keeps its dimension.

        The result's `mask_mod` maps its indices back, so it can be used at once.
        """
        items = index if isinstance(index, tuple) else (index,)
        if len(items) > 3:
            raise IndexError(
                f"a block mask has 3 dimensions to index (batch, heads, rows of query blocks), got {len(items)}"
            )
        sizes = self.kv_num_blocks.shape
        picks = [positions(i, n, d) for d, (i, n) in enumerate(zip(items, sizes, strict=False))]
        picks += [slice(0, n, 1) for n in sizes[len(picks) :]]
        made = self._map(partial(take, picks=picks))
        rows, block = picks[2], self.BLOCK_SIZE[0]
        count, length = made.kv_num_blocks.shape[2], self.seq_lengths[0]
        ends_short = length % block and count and last(rows) == sizes[2] - 1
        made.seq_lengths = (count * block - (block - length % block if ends_short else 0), self.seq_lengths[1])
        if length % block and not isinstance(rows, slice) and bool((rows[:-1] == sizes[2] - 1).any()):
            raise IndexError(
                "the last row of query blocks is shorter than a block, so it can only be the last one picked"
            )
        # A mask that is the same for every batch entry or head stays so.
        shifts = [None if sizes[d] == 1 else picks[d] for d in (0, 1)] + [rows]
        # Here and not at every call of the mask: its maps, where the lists are and in the dtype of an index.
        shifts = [p.to(self.device, torch.int32) if isinstance(p, Tensor) else p for p in shifts]
        made.mask_mod = ShiftedMask.of(self.mask_mod, shifts[0], shifts[1], shifts[2], block)
        return made

    def _adjust(self, new_q_len: int, new_kv_len: int) -> BlockMask:
        """The upper left part of the mask, for shorter sequences."""
        if new_q_len > self.seq_lengths[0] or new_kv_len > self.seq_lengths[1]:
            raise ValueError(
                f"a block mask for {self.seq_lengths} cannot be extended to {(new_q_len, new_kv_len)}; create it anew"
            )
        rows, columns = -(-new_q_len // self.BLOCK_SIZE[0]), -(-new_kv_len // self.BLOCK_SIZE[1])
        made = self._map(lambda t: t[:, :, :rows])
        for kind in ("kv", "full_kv"):
            count, index = getattr(made, f"{kind}_num_blocks"), getattr(made, f"{kind}_indices")
            if count is None:
                continue
            kept = (torch.arange(index.shape[-1], device=self.device) < count.unsqueeze(-1)) & (index < columns)
            order = torch.argsort(kept.int(), dim=-1, descending=True, stable=True)[..., : max(columns, 0)]
            setattr(made, f"{kind}_indices", index.gather(-1, order))
            setattr(made, f"{kind}_num_blocks", kept.sum(-1, dtype=torch.int32))
        made.seq_lengths = (new_q_len, new_kv_len)
        return made

    def to(self, device: torch.device | str) -> BlockMask:
        """The mask on another device: its lists, and the tensors that a mask of `flexattn.masks` holds.

        Tensors in the closure of a mask function of yours stay where they are, and so does an `nn.Module`.
        """
        made = self._map(lambda t: t.to(device))
        made.mask_mod = moved(self.mask_mod, device)
        return made

    def _map(self, function: Callable[[Tensor], Tensor]) -> BlockMask:
        lists = [None if t is None else function(t) for t in (getattr(self, name) for name in _LISTS)]
        assert lists[0] is not None and lists[1] is not None
        return BlockMask(self.seq_lengths, lists[0], lists[1], lists[2], lists[3], self.BLOCK_SIZE, self.mask_mod)

    # ---- text

    def to_string(self, grid_size: int | tuple[int, int] = 20, limit: int = 4) -> str:
        """A picture of the blocks in characters: `█` full or all listed, `░` partly listed, blank none.

        Args:
            grid_size: characters a side, or (rows, columns); -1 for one character a block.
            limit: how many masks of the batch and heads are drawn.
        """
        return picture(self, grid_size, limit)

    def __str__(self) -> str:
        if not all(_has_data(t) for t in self.kv_lists()):
            return repr(self)
        return f"BlockMask(shape={self.shape}, sparsity={self.sparsity():.2f}%)\n{self.to_string()}"

    def __repr__(self) -> str:
        name = getattr(self.mask_mod, "__name__", repr(self.mask_mod))
        full = None if self.full_kv_indices is None else tuple(self.full_kv_indices.shape)
        return (
            f"BlockMask(shape={self.shape}, BLOCK_SIZE={self.BLOCK_SIZE}, kv_indices={tuple(self.kv_indices.shape)}, "
            f"full_kv_indices={full}, mask_mod={name})"
        )


def _has_data(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) and not t.is_meta


class _Columns(NamedTuple):
    """Lists by key block, and the lists by query block that they were made from."""

    num_blocks: Tensor
    indices: Tensor
    by_key: tuple[Tensor, Tensor]


class _Context(NamedTuple):
    seq_lengths: tuple[int, int]
    block_size: tuple[int, int]
    mask_mod: MaskMod


def _flatten(mask: BlockMask) -> tuple[list[Any], _Context]:
    return [getattr(mask, name) for name in _LISTS], _Context(mask.seq_lengths, mask.BLOCK_SIZE, mask.mask_mod)


def _flatten_with_keys(mask: BlockMask) -> tuple[list[tuple[pytree.KeyEntry, Any]], _Context]:
    leaves, context = _flatten(mask)
    return [(pytree.GetAttrKey(n), leaf) for n, leaf in zip(_LISTS, leaves, strict=True)], context


def _unflatten(leaves: Any, context: _Context) -> BlockMask:
    count, index, full_count, full_index = leaves
    return BlockMask(context.seq_lengths, count, index, full_count, full_index, context.block_size, context.mask_mod)


pytree.register_pytree_node(
    BlockMask,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="flexattn.BlockMask",
)
