"""`BlockMask`: which blocks of the score matrix are attended, as lists, and the mask inside the partial ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .block_lists import block_size, check_lists, checked_lengths, has_data
from .block_mask_parts import cropped, part
from .block_mask_picture import svg
from .block_mask_plot import plot
from .block_mask_text import picture
from .block_mask_torch import TorchBlockMask, from_torch, to_torch
from .listed_blocks import LISTS, ListedBlocks
from .mask_object import MaskMod, moved
from .masks import noop_mask

DEFAULT_BLOCK_SIZE = 128


class BlockMask(ListedBlocks):
    """A mask as lists of blocks: for each row of query blocks, the key blocks to visit.

    Blocks in `kv_indices` are *partial*: `mask_mod` decides element by element. Blocks in `full_kv_indices` are *full*:
    every element is attended. A block in neither list is empty, whatever `mask_mod` says. Entries of a row past its
    count mean nothing; rows need not be sorted.

    Attributes:
        seq_lengths: (Q_LEN, KV_LEN); the last block of either may be short.
        kv_num_blocks: [B, H, rows] int32, the number of partial blocks of each row of query blocks.
        kv_indices: [B, H, rows, columns] int32, their positions.
        full_kv_num_blocks, full_kv_indices: the same for full blocks, or None.
        q_num_blocks, q_indices, full_q_num_blocks, full_q_indices: the same lists by key block, made when first asked for.
        BLOCK_SIZE: (queries, keys) of a block.
        mask_mod: function `(b, h, q_idx, kv_idx) -> bool`. It may be replaced.

    B and H are the query's, or 1 where the mask is the same for all. Lists may be narrower than there are key blocks. Make
    one with `create_block_mask` or `from_kv_blocks`, or of others with `&`, `|`, `~` and `offset`. The interface is that
    of `torch.nn.attention.flex_attention.BlockMask`.

    Example:
        >>> import flexattn
        >>> mask = flexattn.create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 512, 512)
        >>> mask.shape, mask.sparsity()
        ((1, 1, 512, 512), 37.5)
        >>> mask[:, :, 2:].shape  # the last two rows of query blocks
        (1, 1, 256, 512)
    """

    mask_mod: MaskMod
    only_first: tuple[bool, bool] = (False, False)  # made for B = 1, or H = 1, of a mask that differs between them

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
        self._columns = {}
        self._described: MaskMod | None = None  # the mask_mod that the lists were made of
        self._sizes = (kv_num_blocks.shape[0], kv_num_blocks.shape[1])
        self._adjacent: tuple[Tensor | None, bool] | None = None  # of which list of full blocks it is said

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
        lengths = checked_lengths(pairs, size, seq_lengths)
        lists = [t for pair in pairs for t in pair[1:]]
        if not torch.compiler.is_compiling() and all(map(has_data, lists)):
            # Before the conversion, which would bring an index that is out of range back into it.
            check_lists(lists, -(-lengths[1] // size[1]))
        lists = [t.to(torch.int32) for t in lists]
        full_count, full_index = (lists[2], lists[3]) if len(lists) > 2 else (None, None)
        return cls(lengths, lists[0], lists[1], full_count, full_index, size, mask_mod)

    @classmethod
    def from_torch(cls, block_mask: TorchBlockMask) -> BlockMask:
        """The mask of a `torch.nn.attention.flex_attention.BlockMask`, with the same lists, lengths and mask_mod.

        Its lists are not copied where they are int32, as those of `create_block_mask` are. Lists by key block and write
        orders are not needed here.

        Raises:
            TypeError: for anything else.
            ValueError: for a slice of one, whose mask_mod PyTorch took away, and as `from_kv_blocks`.

        Example:
            >>> import flexattn, torch.nn.attention.flex_attention as torch_flex
            >>> theirs = torch_flex.create_block_mask(flexattn.masks.causal_mask, None, None, 512, 512, device="cpu")
            >>> flexattn.BlockMask.from_torch(theirs).shape
            (1, 1, 512, 512)
        """
        return from_torch(cls, block_mask)

    def to_torch(self) -> TorchBlockMask:
        """A `torch.nn.attention.flex_attention.BlockMask` with the same lists, as wide as there are key blocks, int32, and
        lists by key block, so that PyTorch's `flex_attention` can use it.

        Its `mask_mod` is this mask's, where the lists were made of it. Otherwise it is one that reads the lists too, since
        PyTorch in eager mode looks at nothing but the mask_mod.

        Example:
            >>> import flexattn
            >>> mask = flexattn.create_block_mask(flexattn.masks.sliding_window(9), None, None, 4096, 4096, device="cpu")
            >>> mask.kv_indices.shape, mask.to_torch().kv_indices.shape
            (torch.Size([1, 1, 32, 16]), torch.Size([1, 1, 32, 32]))
        """
        return to_torch(self, _algebra().whole_mask_mod(self))

    # ---- views of the same data

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
    def sizes(self) -> tuple[int, int]:
        """The B and H it was made for, which its lists have once where they are the same for all."""
        return self._sizes

    @property
    def is_exact(self) -> bool:
        """Whether `mask_mod` by itself says what is attended, as where the lists were made of it."""
        return self._described is self.mask_mod

    @property
    def contiguous(self) -> bool | None:
        """Whether the full blocks of each row are adjacent, so that kernels may count them instead of reading the lists;
        None if it is not known, as of a mask that was made from lists."""
        said = self._adjacent
        return said[1] if said is not None and said[0] is self.full_kv_indices else None

    def mark(self, B: int, H: int, contiguous: bool | None) -> None:
        """Say that the lists were made of `mask_mod`, for so many batch entries and heads, and whether `contiguous`."""
        self._described, self._sizes = self.mask_mod, (B, H)
        self._adjacent = None if contiguous is None else (self.full_kv_indices, contiguous)

    # ---- derived masks

    def __getitem__(self, index: Any) -> BlockMask:
        """The mask of some batch entries, heads and rows of query blocks, in this order. An int keeps its dimension.

        The result's `mask_mod` maps its indices back, so it can be used at once.
        """
        return part(self, index)

    def __and__(self, other: BlockMask) -> BlockMask:
        """Attended where both masks attend. Lengths, block sizes and devices must agree, B and H agree or be 1.

        Raises `ValueError` where they do not. The lists are exact: blocks that are partial in both may be empty here.
        """
        return _algebra().combine("&", self, other) if isinstance(other, BlockMask) else NotImplemented

    def __or__(self, other: BlockMask) -> BlockMask:
        """Attended where one of the masks attends; as `&`."""
        return _algebra().combine("|", self, other) if isinstance(other, BlockMask) else NotImplemented

    def __invert__(self) -> BlockMask:
        """Attended where the mask does not attend."""
        return _algebra().complement(self)

    def offset(
        self, q: int | Tensor = 0, kv: int | Tensor = 0, *, Q_LEN: int | None = None, KV_LEN: int | None = None
    ) -> BlockMask:
        """The mask as seen from query `q` and key `kv`: attended where `(q_idx + q, kv_idx + kv)` is in this mask.

        For decoding: `mask.offset(q=t, Q_LEN=1)` is the row of the query at position t. Positions need not be multiples
        of the block size. A mask that was built from a function may be left: captured tensors must reach as far.

        Args:
            q, kv: 0 or more: an int, or an integer tensor, 0-d or one position for each batch entry, [B].
            Q_LEN, KV_LEN: lengths of the new mask. Default: what is left of this one's.

        Raises:
            ValueError: for offsets below 0, tensors without the length, and positions beyond a mask made from lists.

        Example:
            >>> import flexattn
            >>> causal = flexattn.create_block_mask(flexattn.masks.causal_mask, None, None, 512, 512)
            >>> step = causal.offset(q=300, Q_LEN=1)
            >>> step.shape, step.full_kv_num_blocks.tolist(), step.kv_indices[0, 0, 0, 0].item()
            ((1, 1, 1, 512), [[[2]]], 2)
        """
        return _algebra().offset(self, q, kv, Q_LEN, KV_LEN)

    def _adjust(self, new_q_len: int, new_kv_len: int) -> BlockMask:
        """The upper left part of the mask, for shorter sequences."""
        return cropped(self, new_q_len, new_kv_len)

    def to(self, device: torch.device | str) -> BlockMask:
        """The mask on another device: its lists, and the tensors that a mask of `flexattn.masks` holds.

        Tensors in the closure of a mask function of yours stay where they are, and so does an `nn.Module`.
        """
        made = self._map(lambda t: t.to(device))
        made.mask_mod = moved(self.mask_mod, device)
        made._described = made.mask_mod if self.is_exact else None
        return made

    def _map(self, function: Callable[[Tensor], Tensor]) -> BlockMask:
        lists = [None if t is None else function(t) for t in (getattr(self, name) for name in LISTS)]
        assert lists[0] is not None and lists[1] is not None
        made = BlockMask(self.seq_lengths, lists[0], lists[1], lists[2], lists[3], self.BLOCK_SIZE, self.mask_mod)
        made.mark(*self._sizes, self.contiguous)  # what is true of all rows is true of some
        made._described, made.only_first = self._described, self.only_first
        return made

    def __getstate__(self) -> dict[str, Any]:
        # Lists by key block do not travel: they are made again where they are asked for.
        return {**self.__dict__, "_columns": {}}

    # ---- text and pictures

    def to_string(self, grid_size: int | tuple[int, int] = 20, limit: int = 4) -> str:
        """A picture of the blocks in characters: `█` full or all listed, `░` partly listed, blank none.

        Args:
            grid_size: characters a side, or (rows, columns); -1 for one character a block.
            limit: how many masks of the batch and heads are drawn.
        """
        return picture(self, grid_size, limit)

    def to_svg(
        self,
        batch: int = 0,
        head: int = 0,
        zoom: tuple[int, int] | str | None = None,
        max_cells: int = 128,
        title: str | None = None,
    ) -> str:
        """A picture of one batch entry and head as SVG: kinds of blocks, sparsity, and blocks visited by each row.

        Args:
            batch, head: which; 0 where the mask is the same for all.
            zoom: a block, (row, column), whose elements are drawn beside it; "auto": the first partial one.
            max_cells: cells a side; more blocks than that share cells, shaded by how many are visited.
            title: a heading.

        Raises `IndexError` or `ValueError` for what is out of range.

        Example:
            >>> import flexattn
            >>> mask = flexattn.create_block_mask(flexattn.masks.sliding_window(100), None, None, 512, 512)
            >>> mask.to_svg(zoom="auto").startswith("<svg")
            True
        """
        return svg(self, batch, head, zoom, max_cells, title)

    def plot(
        self,
        batch: int = 0,
        head: int = 0,
        zoom: tuple[int, int] | str | None = None,
        ax: Any = None,
        max_cells: int = 512,
    ) -> Any:
        """The picture of `to_svg` by matplotlib (`pip install 'flexattn[plot]'`), on axes `ax` or a figure of its own.

        Returns the axes.
        Raises `ImportError` without matplotlib, and as `to_svg`.
        """
        return plot(self, batch, head, zoom, ax, max_cells)

    def __str__(self) -> str:
        if not all(has_data(t) for t in self.kv_lists()):
            return repr(self)
        return f"BlockMask(shape={self.shape}, sparsity={self.sparsity():.2f}%)\n{self.to_string()}"

    def __repr__(self) -> str:
        name = getattr(self.mask_mod, "__name__", repr(self.mask_mod))
        full = None if self.full_kv_indices is None else tuple(self.full_kv_indices.shape)
        return (
            f"BlockMask(shape={self.shape}, BLOCK_SIZE={self.BLOCK_SIZE}, kv_indices={tuple(self.kv_indices.shape)}, "
            f"full_kv_indices={full}, mask_mod={name})"
        )


def _algebra() -> Any:
    from . import mask_algebra  # which makes block masks itself

    return mask_algebra
