"""The aligned layout of packed documents: each begins at a multiple of the block size, zeros fill up its last block.

In: ids of documents, [B, S]. Out: tables that say which token stands where, and the tokens there and back. A block then holds
tokens of one document, and what is computed in it depends on that document alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .codegen.private import forward_mode_is_on

BLOCK = 128  # tokens: a document begins at a multiple of it


class Aligned(NamedTuple):
    """Rows of `length` places, in which every document begins at a multiple of `BLOCK`.

    Attributes:
        position: int32 [B, length], the position in the packed row of the token at a place; after the last token of a
            document, that token's.
        first, stop: int32 [B, length], the places from the first token of the same document to behind the last; 0 and 0 for
            a place without a token.
        place: int64 [B, S], the place of each token; 0 for padding.
        padding: bool [B, S], the tokens that belong to no document, or None where there are none.
        moved: whether any token stands elsewhere than in the packed row.

    B is 1 where all rows of a batch are packed alike.
    """

    position: Tensor
    first: Tensor
    stop: Tensor
    place: Tensor
    padding: Tensor | None
    moved: bool

    @property
    def length(self) -> int:
        """Places of a row."""
        return self.position.shape[1]

    def spread(self, tokens: Tensor) -> Tensor:
        """Tokens [B, H, S, ...] as [B, H, length, ...], zero where there is none."""
        if not self.moved:
            return tokens
        return _rows(tokens, (self.position, self.first == self.stop), (self.place, self.padding), 0.0)

    def packed(self, places: Tensor, padding: float) -> Tensor:
        """The inverse of `spread`, with a value for padding."""
        if not self.moved:
            return places
        return _rows(places, (self.place, self.padding), (self.position, self.first == self.stop), padding)


def of_ids(ids: Tensor) -> Aligned:
    """The layout of documents with ids [B, S] that count from 0, negative for padding. The host waits for the device."""
    with torch.inference_mode(False):  # what is kept may be used to train
        return _of_ids(ids.clone() if ids.is_inference() else ids)


def _of_ids(ids: Tensor) -> Aligned:
    B, S = ids.shape
    device = ids.device
    real = ids >= 0
    documents = int(ids.max()) + 1 if ids.numel() else 0
    number = torch.where(real, ids, documents).long()  # padding comes last
    counts = torch.zeros(B, documents + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(1, number, torch.ones_like(number))
    taken = -(-counts // BLOCK) * BLOCK
    taken[:, documents] = 0
    ends = taken.cumsum(1)
    starts = ends - taken
    order = torch.argsort(number, dim=1, stable=True)
    before = counts.cumsum(1) - counts  # tokens of documents with lower numbers
    rank = torch.empty_like(number).scatter_(1, order, torch.arange(S, device=device).expand(B, S))
    rank -= before.gather(1, number)
    place = (starts.gather(1, number) + rank).masked_fill(~real, 0)

    length = max(BLOCK, int(ends[:, -1].max())) if B and S else 0  # a row of padding has a place to be read from
    at = torch.arange(length, device=device).expand(B, length).contiguous()
    owner = torch.searchsorted(ends, at, right=True).clamp_max(documents)
    start, count = starts.gather(1, owner), counts.gather(1, owner)
    exists = (owner < documents) & (at - start < count)
    nearest = before.gather(1, owner) + torch.minimum(at - start, count - 1)
    position = order.gather(1, nearest.clamp(0, max(0, S - 1))) if S else at
    position = position.masked_fill(owner == documents, 0)
    first, stop = torch.where(exists, start, 0), torch.where(exists, start + count, 0)
    stay = length == S and bool((place == torch.arange(S, device=device)).all() & real.all())
    padding = None if stay or bool(real.all()) else ~real
    return Aligned(position.int(), first.int(), stop.int(), place, padding, not stay)


def whole_rows(S: int, device: torch.device) -> Aligned:
    """The layout of rows that are one document each."""
    length = (S + BLOCK - 1) // BLOCK * BLOCK
    at = torch.arange(length, dtype=torch.int32, device=device).unsqueeze(0)
    exists = at < S
    stop = torch.where(exists, S, 0).int()
    place = torch.arange(S, device=device).unsqueeze(0)  # a slice of `at` would ask a symbolic S to be at most `length`
    # What is exported serves lengths that are multiples of the block size as well as others.
    moved = torch.compiler.is_exporting() or length != S
    return Aligned(at.clamp_max(max(0, S - 1)), torch.zeros_like(at), stop, place, None, moved)


@lru_cache(maxsize=32)
def kept_whole_rows(S: int, B: int, device: torch.device) -> Aligned:
    """`whole_rows` for a batch, the same object for the same arguments."""
    with torch.inference_mode(False):
        return for_batch(whole_rows(S, device), B)


def for_batch(layout: Aligned, B: int) -> Aligned:
    """The layout with tables of B rows, which repeat the only one."""
    position, first, stop = (t.expand(B, -1) for t in layout[:3])
    return layout._replace(position=position, first=first, stop=stop)


# ---- tokens there and back


def copied_both_ways(tokens: Tensor) -> Tensor:
    """A copy of tokens [B, H, S, ...] whose gradient is a copy too: both with the strides and the alignment of new tensors."""
    every = torch.arange(tokens.shape[2], device=tokens.device).unsqueeze(0), None
    return _rows(tokens, every, every, 0.0)


_Index = tuple[Tensor, Tensor | None]  # rows [B or 1, M] to read, and which of them are not there


def _rows(x: Tensor, there: _Index, back: _Index, fill: float) -> Tensor:
    """The rows of x [B, H, N, ...] that `there` names, `fill` for those that are not there; `back` is the inverse."""
    tangents = not torch.compiler.is_compiling() and forward_mode_is_on()  # Dynamo takes no function that has a jvp
    made: Tensor = (_RowsAndTangents if tangents else _Rows).apply(x, *there, *back, fill)  # type: ignore[no-untyped-call]
    return made


def _gathered(x: Tensor, index: Tensor, missing: Tensor | None, fill: float) -> Tensor:
    index, missing = _once(index), None if missing is None else _once(missing)
    rest = (1,) * (x.dim() - 3)
    if index.shape[0] == 1:
        found = x.index_select(2, index[0])
    else:
        index = index.long().view(index.shape[0], 1, index.shape[1], *rest)
        found = x.gather(2, index.expand(-1, x.shape[1], -1, *x.shape[3:]))
    if missing is None:
        return found
    return found.masked_fill(missing.view(missing.shape[0], 1, missing.shape[1], *rest), fill)


def _once(table: Tensor) -> Tensor:
    """A table without its repetitions for the entries of a batch."""
    return table[:1] if table.stride(0) == 0 else table


class _Rows(torch.autograd.Function):
    """A gather whose gradient is a gather too: no sum, so that not even the sign of a zero depends on other rows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, index: Tensor, missing: Tensor | None, back: Tensor, not_back: Tensor | None, fill: float
    ) -> Tensor:
        return _gathered(x, index, missing, fill)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:5])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        index, missing, back, not_back = ctx.saved_tensors
        return _rows(grad, (back, not_back), (index, missing), 0.0), None, None, None, None, None


class _RowsAndTangents(_Rows):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:5])
        ctx.save_for_forward(*inputs[1:5])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        index, missing, *_ = ctx.saved_tensors
        return _gathered(tangent, index, missing, 0.0)
