"""`Documents`: which document of a packed sequence each token belongs to. In: any of five notations. Out: any, or a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .aligned import Aligned, of_ids
from .block_lists import has_data
from .mask_object import MaskMod, MaskObject
from .masks import and_masks, document_mask
from .masks.combine import check_callable
from .masks.parameters import at, check_ids, described, holds_integers, is_integer

T = TypeVar("T")


@dataclass(frozen=True, eq=False, repr=False)
class Documents:
    """Documents packed into one sequence, or into each row of a batch. Make one by a `from_` method.

    The same packing of 3 + 2 tokens and one of padding, in each notation:

        cu_seqlens     0 3 5              where documents start, and the end (FlashAttention's varlen functions)
        lengths        3 2
        document_ids   0 0 0 1 1 -1       -1 is padding
        seq_idx      [[0 0 0 1 1 -1]]     the same with a batch (Mamba's kernels, Hugging Face)
        position_ids   0 1 2 0 1 0        restart in each document

    Padding attends to nothing but padding, and nothing else attends to it. Everything is computed on the device of the
    input, without a loop over documents; what is read is computed once and kept.

    Attributes:
        document_ids: int32 [S] or [B, S], -1 for padding. From `cu_seqlens` or lengths, a document has its number there, and
            a number without tokens is an empty document; otherwise numbers count from 0 in order of first appearance in
            the row.
        count: how many documents there are, where it was told (`cu_seqlens`, lengths); otherwise None.

    Example:
        >>> import torch, flexattn
        >>> packed = flexattn.Documents.from_cu_seqlens(torch.tensor([0, 3, 5]))
        >>> packed.document_ids.tolist(), packed.position_ids.tolist()
        ([0, 0, 0, 1, 1], [0, 1, 2, 0, 1])
        >>> packed.mask(flexattn.masks.causal_mask)
        and_masks(document_mask([5]), causal_mask)
    """

    document_ids: Tensor
    count: int | None = None
    _values: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        ids = self.document_ids
        if not isinstance(ids, Tensor) or ids.dtype is not torch.int32 or ids.dim() not in (1, 2):
            raise ValueError(
                f"Documents holds int32 ids that count from 0, got {described(ids)}; write "
                "Documents.from_document_ids(ids) for ids of your own"
            )

    def __repr__(self) -> str:
        return f"Documents({list(self.document_ids.shape)})"

    def __getstate__(self) -> dict[str, Any]:
        # What was computed does not travel: it is computed again where it is read.
        return {**self.__dict__, "_values": {}}

    # ---- from each notation

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, length: int | None = None) -> Documents:
        """Documents that start at the given positions of one sequence.

        Args:
            cu_seqlens: integers [docs + 1]: 0, then the end of each document. Two equal ones are an empty document.
            length: tokens of the sequence; those past the last end are padding. Default: the last end, for which the host
                waits for the device.

        Raises:
            ValueError: for anything but rising positions from 0 that fit into the length (not checked while compiling).

        Example:
            >>> import torch, flexattn
            >>> flexattn.Documents.from_cu_seqlens(torch.tensor([0, 2, 2, 3]), length=4).document_ids.tolist()
            [0, 0, 2, -1]
        """
        ends = cu_seqlens
        if not isinstance(ends, Tensor) or ends.dim() != 1 or not holds_integers(ends) or ends.shape[0] == 0:
            raise ValueError(f"cu_seqlens must be an integer tensor [docs + 1]; got {described(ends)}")
        if length is not None and (not is_integer(length) or length < 0):
            raise ValueError(f"length must be a number of tokens, or None; got {described(length)}")
        if has_data(ends):
            _check_ends(ends, length)
        length = int(ends[-1]) if length is None else length
        positions = torch.arange(length, device=ends.device)
        ids = torch.searchsorted(ends[1:].long(), positions, right=True, out_int32=True)
        return cls(ids.masked_fill(ids == ends.shape[0] - 1, -1), ends.shape[0] - 1)

    @classmethod
    def from_lengths(cls, lengths: Tensor | Sequence[int], length: int | None = None) -> Documents:
        """Documents of the given lengths, one after another in one sequence.

        Args:
            lengths: integers [docs], or a sequence of ints; 0 is an empty document.
            length: tokens of the sequence; those past the last document are padding. Default: the sum.

        Raises:
            ValueError: for lengths that are no integers, below 0, or longer than the sequence together.

        Example:
            >>> import flexattn
            >>> flexattn.Documents.from_lengths([3, 2]).cu_seqlens.tolist()
            [0, 3, 5]
        """
        if not isinstance(lengths, Tensor):
            if not all(is_integer(n) for n in lengths):
                raise ValueError(f"lengths must be integers, one a document; got {lengths!r}")
            lengths = torch.tensor(lengths, dtype=torch.int32)
        if lengths.dim() != 1 or not holds_integers(lengths):
            raise ValueError(f"lengths must be an integer tensor [docs]; got {described(lengths)}")
        if has_data(lengths) and bool((lengths < 0).any()):
            raise ValueError("lengths must be 0 or more; one is negative")
        return cls.from_cu_seqlens(torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), length)

    @classmethod
    def from_position_ids(cls, position_ids: Tensor) -> Documents:
        """Documents that start wherever the position is not the one before plus 1.

        Args:
            position_ids: integers [S] or [B, S]. The first document of a row may start at any position, as in the later
                part of a sequence that was split. Padding by equal positions makes a document of each of its tokens.

        Hugging Face (`find_packed_sequence_indices`) reads them the same way; looking for zeros instead, as its
        FlashAttention path does, differs where a document does not start at 0.

        Raises:
            ValueError: for positions that are no integers [S] or [B, S], such as the three rows of M-RoPE.

        Example:
            >>> import torch, flexattn
            >>> flexattn.Documents.from_position_ids(torch.tensor([0, 1, 0, 0, 1])).lengths.tolist()
            [2, 1, 2]
        """
        _check("position_ids", position_ids, "for positions of several axes choose one: position_ids[0]")
        starts = torch.ones_like(position_ids, dtype=torch.int32)
        starts[..., 1:] = position_ids[..., 1:] != position_ids[..., :-1].long() + 1
        return cls(starts.cumsum(-1, dtype=torch.int32) - 1)

    @classmethod
    def from_document_ids(cls, ids: Tensor) -> Documents:
        """Documents told apart by an id for each token.

        Args:
            ids: integers [S] or [B, S], any values in any order; a document may come in several pieces. -1 is a document
                like others: where negative means padding, write `from_seq_idx`.

        Raises:
            ValueError: for ids that are no integers [S] or [B, S].

        Example:
            >>> import torch, flexattn
            >>> flexattn.Documents.from_document_ids(torch.tensor([7, 7, -3, 7])).document_ids.tolist()
            [0, 0, 1, 0]
        """
        _check("ids", ids, "for nested lists write torch.tensor(ids)")
        first = _first_of_its_id(ids)
        return cls(_numbered(first, torch.ones_like(first, dtype=torch.bool)))

    @classmethod
    def from_seq_idx(cls, seq_idx: Tensor) -> Documents:
        """As `from_document_ids`, with negative ids for padding.

        Args:
            seq_idx: integers [B, S], as Mamba's kernels and Hugging Face take them, or [S].

        Raises:
            ValueError: for ids that are no integers [S] or [B, S].

        Example:
            >>> import torch, flexattn
            >>> flexattn.Documents.from_seq_idx(torch.tensor([[4, 4, 5, -1]])).document_ids.tolist()
            [[0, 0, 1, -1]]
        """
        _check("seq_idx", seq_idx, "for nested lists write torch.tensor(seq_idx)")
        return cls(_numbered(_first_of_its_id(seq_idx), seq_idx >= 0))

    # ---- to each notation

    @property
    def position_ids(self) -> Tensor:
        """int32, shaped as `document_ids`: how many tokens of the same document come before; padding counts as one document.

        Example:
            >>> import torch, flexattn
            >>> flexattn.Documents.from_document_ids(torch.tensor([0, 0, 1, 0])).position_ids.tolist()
            [0, 1, 0, 2]
        """
        return self._kept("position_ids", lambda: _earlier_of_the_same(self.document_ids))

    @property
    def seq_idx(self) -> Tensor:
        """int32 [B, S]: `document_ids` with a batch dimension."""
        return self.document_ids if self.document_ids.dim() == 2 else self.document_ids.unsqueeze(0)

    @property
    def lengths(self) -> Tensor:
        """int32 [docs]: tokens of each document of a single row, padding left out.

        Raises:
            ValueError: for more than one row.
        """
        ids = self._row("lengths")
        return self._kept("lengths", lambda: torch.bincount(ids[ids >= 0], minlength=self.count or 0).to(torch.int32))

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [docs + 1]: where each document of a single row starts, and the end of the last.

        Raises:
            ValueError: for more than one row, for documents in several pieces, and for padding before a document: none of
                it can be told by positions.

        Example:
            >>> import torch, flexattn
            >>> flexattn.Documents.from_position_ids(torch.tensor([0, 1, 0])).cu_seqlens.tolist()
            [0, 2, 3]
        """
        ids = self._row("cu_seqlens")

        def ends() -> Tensor:
            if has_data(ids):
                _check_contiguous(ids)
            return torch.nn.functional.pad(self.lengths.cumsum(0, dtype=torch.int32), (1, 0))

        return self._kept("cu_seqlens", ends)

    def flatten(self) -> Documents:
        """The rows of a batch one after another, as one sequence [B * S], no document in two rows.

        Example:
            >>> import torch, flexattn
            >>> rows = torch.tensor([[0, 0, 1], [0, 1, 1]])
            >>> flexattn.Documents.from_document_ids(rows).flatten().cu_seqlens.tolist()
            [0, 2, 3, 4, 6]
        """
        rows = self.seq_idx
        if rows.shape[0] == 1:
            return replace(self, document_ids=rows[0])
        apart = rows.long() + torch.arange(rows.shape[0], device=rows.device).unsqueeze(-1) * (rows.shape[1] + 1)
        return Documents.from_seq_idx(apart.masked_fill(rows < 0, -1).flatten())

    @property
    def aligned(self) -> Aligned:
        """The layout that `flex_attention(batch_invariant=documents)` computes in: each document begins at a multiple of 128.

        Made once, for which the host waits for the device. Compiled code cannot make it: read it once outside.

        Example:
            >>> import flexattn
            >>> packed = flexattn.Documents.from_lengths([100, 200])
            >>> packed.aligned.length, packed.aligned.place[0, [0, 99, 100, 299]].tolist()
            (384, [0, 99, 128, 327])
        """
        unknown = torch.compiler.is_compiling() or self.document_ids.is_meta or type(self.document_ids) is not Tensor
        if unknown and "aligned" not in self._values:
            raise RuntimeError("compiled code cannot lay documents out: read documents.aligned once outside of it")
        return self._kept("aligned", lambda: of_ids(self.seq_idx))

    # ---- to a mask

    def mask(self, mask_mod: MaskMod | None = None, local: bool = False) -> MaskMod:
        """A mask_mod that attends within documents, and-ed with `mask_mod` where one is given.

        Args:
            mask_mod: function `(b, h, q_idx, kv_idx) -> bool`, such as `causal_mask`.
            local: whether `mask_mod` sees positions that restart in each document, rather than those of the packed sequence.
                It makes no difference to masks of a distance (causal, windows), which are better left without, as there is
                less to read; `prefix_lm`, `chunked`, `streaming` and others that name a position mean it.

        For a batch of one row the mask does not depend on the batch.

        Example:
            >>> import flexattn
            >>> packed = flexattn.Documents.from_lengths([2, 3])
            >>> prefix = packed.mask(flexattn.masks.prefix_lm(2), local=True)
            >>> flexattn.create_mask(prefix, None, None, 5, 5)[0, 0].int().tolist()
            [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
        """
        # Both kept: block masks are cached by the tensors they were made from.
        together = self._kept("mask", lambda: document_mask(_without_batch(self.document_ids)))
        if mask_mod is None:
            return together
        check_callable("Documents.mask", (mask_mod,))
        if not local:
            return and_masks(together, mask_mod)
        positions = self._kept("local", lambda: _without_batch(self.position_ids))
        return and_masks(together, _Local(mask_mod, positions))

    def to(self, device: torch.device | str) -> Documents:
        """The same documents on another device."""
        return replace(self, document_ids=self.document_ids.to(device))

    def _kept(self, name: str, make: Callable[[], T]) -> T:
        # functools.cached_property takes a lock before Python 3.12, which torch.compile cannot trace.
        if name not in self._values:
            self._values[name] = make()
        return self._values[name]

    def _row(self, what: str) -> Tensor:
        ids = _without_batch(self.document_ids)
        if ids.dim() == 2:
            raise ValueError(
                f"{what} describes one sequence, these are {ids.shape[0]} rows. Write documents.flatten().{what} and flatten "
                "the tokens the same way, or take a row: Documents.from_seq_idx(documents.seq_idx[i])"
            )
        return ids


@dataclass(frozen=True, eq=False, repr=False)
class _Local(MaskObject):
    """A mask at positions that are looked up."""

    mask: MaskMod
    positions: Tensor

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.mask(b, h, at(self.positions, b, q_idx), at(self.positions, b, kv_idx))

    def __repr__(self) -> str:
        return f"local({getattr(self.mask, '__name__', repr(self.mask))})"


def _without_batch(t: Tensor) -> Tensor:
    return t[0] if t.dim() == 2 and t.shape[0] == 1 else t


def _check(what: str, value: Any, advice: str) -> None:
    try:
        check_ids(what, value)
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from None


def _check_ends(ends: Tensor, length: int | None) -> None:
    falls = bool((ends.diff() < 0).any())
    first, last = ends[[0, -1]].tolist()
    if first != 0 or falls:
        raise ValueError(
            f"cu_seqlens must start at 0 and not fall; it starts at {first}{' and falls' if falls else ''}. For the lengths "
            "of documents write Documents.from_lengths(lengths)"
        )
    if length is not None and length < last:
        raise ValueError(f"cu_seqlens ends at {last}, beyond the length of {length}; give a length of at least {last}")


def _check_contiguous(ids: Tensor) -> None:
    real = ids >= 0
    if bool((~real[:-1] & real[1:]).any()):
        raise ValueError(
            "cu_seqlens has no way to tell padding before a document; move the padding to the end of the row, or use .mask()"
        )
    if bool((real[1:] & (ids.diff() < 0)).any()):
        raise ValueError(
            "a document comes in several pieces, which cu_seqlens cannot tell; sort the tokens by document first: "
            "order = documents.document_ids.argsort(stable=True), or use .mask()"
        )


def _group_starts(grouped: Tensor) -> Tensor:
    """For each place of a sorted row, the place where its run of equal values begins."""
    places = torch.arange(grouped.shape[-1], device=grouped.device).expand_as(grouped)
    begins = torch.zeros_like(grouped, dtype=torch.bool)
    begins[..., 1:] = grouped[..., 1:] != grouped[..., :-1]
    return torch.where(begins, places, 0).cummax(-1).values


def _earlier_of_the_same(ids: Tensor) -> Tensor:
    """For each token, how many before it in its row have the same id."""
    grouped, order = torch.sort(ids, dim=-1, stable=True)
    places = torch.arange(grouped.shape[-1], device=grouped.device).expand_as(grouped)
    return torch.empty_like(grouped).scatter(-1, order, (places - _group_starts(grouped)).to(grouped.dtype))


def _first_of_its_id(ids: Tensor) -> Tensor:
    """For each token, the first position of its row that has the same id."""
    grouped, order = torch.sort(ids, dim=-1, stable=True)
    return torch.empty_like(order).scatter(-1, order, order.gather(-1, _group_starts(grouped)))


def _numbered(first: Tensor, real: Tensor) -> Tensor:
    """Ids from 0 in order of the first positions; -1 where a token is not real."""
    leads = (first == torch.arange(first.shape[-1], device=first.device)) & real
    number = leads.cumsum(-1, dtype=torch.int32) - 1
    return number.gather(-1, first).masked_fill(~real, -1)
