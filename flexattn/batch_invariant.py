"""Attention whose results depend on one document alone: the operands and mods of a call in the aligned layout, and back.

A sum's bits depend on how its terms are grouped, and a kernel groups them by the blocks of the row. In the layout of `aligned`
a document has blocks of its own, wherever it stands; the operators, told BATCH_INVARIANT, compute each block in the same way
whatever else there is. Mods see the positions of the packed row, which tables give them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .aligned import Aligned, for_batch, kept_whole_rows, whole_rows
from .block_lists import has_data
from .documents import Documents
from .layout import in_order_of
from .mask_object import MaskMod, MaskObject, name_of
from .sharded import involved

ScoreMod = Callable[..., Tensor]


class Arranged(NamedTuple):
    """A call in the aligned layout, with the layout; None where operands are as the caller gave them."""

    query: Tensor
    key: Tensor
    value: Tensor
    score_mod: ScoreMod | None
    mask_mod: MaskMod | None
    layout: Aligned | None

    def back(self, query: Tensor, results: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Output, lse and max_scores of the caller's query, from those of this call. Padding attends to nothing."""
        if self.layout is None or not self.layout.moved:
            return results
        out, lse, max_scores = results
        nothing = float("-inf")
        out = in_order_of(query, self.layout.packed(out, 0.0))
        return out, self.layout.packed(lse, nothing), self.layout.packed(max_scores, nothing).detach()


def arranged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None,
    mask_mod: MaskMod | None,
    block_mask: Any,
    documents: bool | Documents,
) -> Arranged:
    """A validated call with `batch_invariant=documents`, not False, as the operators shall compute it."""
    B, S = query.shape[0], key.shape[2]
    for name, mod, arguments in (("score_mod", score_mod, "score, b, h"), ("mask_mod", mask_mod, "b, h")):
        if mod is not None and not callable(mod):
            raise TypeError(f"{name} is a {type(mod).__name__}; pass a function ({arguments}, q_idx, kv_idx)")
    if isinstance(documents, Documents):
        layout = _layout_of(documents, B)
        rows = documents.seq_idx.shape[0]
        if key.shape[0] < rows:  # keys that all entries share, and that are packed another way in each
            key, value = key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1)
    elif block_mask is not None or query.shape[2] != S:
        return Arranged(query, key, value, score_mod, mask_mod, None)
    elif has_data(query) and type(S) is int:
        layout = kept_whole_rows(S, B, query.device)
    else:
        layout = for_batch(whole_rows(S, query.device), B)
    query, key, value = (layout.spread(t) for t in (query, key, value))
    modify = None if score_mod is None else _Modified(score_mod, layout.position)
    return Arranged(query, key, value, modify, _Within(mask_mod, *layout[:3]), layout)


def _layout_of(documents: Documents, B: int) -> Aligned:
    if not has_data(documents.document_ids):
        return for_batch(documents.aligned, B)
    # The same tensors at every call: block masks are cached by the tensors they were made from.
    found: Aligned = documents._kept(f"aligned for {B}", lambda: for_batch(documents.aligned, B))
    return found


@dataclass(frozen=True, eq=False, repr=False)
class _Modified:
    """A score_mod that sees the positions of the packed row."""

    mod: ScoreMod
    position: Tensor

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.mod(score, b, h, self.position[b, q_idx], self.position[b, kv_idx])


@dataclass(frozen=True, eq=False, repr=False)
class _Within(MaskObject):
    """A mask that sees the positions of the packed row, within documents."""

    mask: MaskMod | None
    position: Tensor
    first: Tensor
    stop: Tensor

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        # As limits of the key, which block masks are made from fastest.
        together = (kv_idx >= self.first[b, q_idx]) & (kv_idx < self.stop[b, q_idx])
        if self.mask is None:
            return together
        return together & self.mask(b, h, self.position[b, q_idx], self.position[b, kv_idx])

    def __repr__(self) -> str:
        return f"within_documents({'' if self.mask is None else name_of(self.mask)})"


def check(documents: Any, query: Tensor, key: Tensor, block_mask: Any) -> None:
    """Raise for a `batch_invariant` that does not fit the call, with what to write instead."""
    if documents is False:
        return
    if documents is not True and not isinstance(documents, Documents):
        raise TypeError(
            f"batch_invariant is a {type(documents).__name__}; pass True, or for packed rows their documents: "
            "batch_invariant=flexattn.Documents.from_cu_seqlens(cu_seqlens)"
        )
    if involved(query, key):
        raise NotImplementedError(
            "batch_invariant is for tensors of one device, and query or key is a DTensor. Call flex_attention on the parts, "
            "which are whole rows where the batch or the heads are sharded: query.to_local()"
        )
    if documents is True:
        return
    B, L, S = query.shape[0], query.shape[2], key.shape[2]
    if block_mask is not None:
        raise ValueError(
            "both block_mask and the documents of batch_invariant are given. The blocks are then those of the documents: pass "
            "the mask as a function, such as mask_mod=flexattn.masks.causal_mask; what keeps documents apart is not needed"
        )
    rows, length = documents.seq_idx.shape
    if L != S or length != L:
        raise ValueError(
            f"batch_invariant has documents of {length} tokens, query has {L} and key {S}; all three must be equal. Where "
            "queries and keys differ in length, as with a cache, write batch_invariant=True"
        )
    if rows != 1 and rows != B:  # not `in`, see validate.block_mask
        raise ValueError(
            f"batch_invariant has documents of {rows} rows, query has batch {B}; give one row for "
            "each batch entry, or one for all"
        )
    if documents.document_ids.device != query.device:
        raise ValueError(
            f"batch_invariant has documents on {documents.document_ids.device}, query is on {query.device}; move them once: "
            f"documents = documents.to({str(query.device)!r})"
        )
