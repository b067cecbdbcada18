"""`assert_no_leak`: packed documents do not see each other, in the mask and to the last bit of outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..api import flex_attention
from ..block_mask import BlockMask
from ..codegen.tiles import DEFAULT_MEMORY
from ..documents import Documents
from ..mask_object import MaskObject
from ..masks.parameters import at, check_ids, check_same_dims
from .interference import Attention, Change, Experiment, Positions
from .mask_picture import drawn
from .search import search
from .sizes import Sizes
from .traced_mask import MaskMod, TracedMask, called, device_of, mask_function


def assert_no_leak(
    mask_mod: MaskMod | BlockMask | None,
    document_ids: Tensor | Documents,
    *,
    kv_document_ids: Tensor | Documents | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    attention: Attention | None = None,
    batch: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str = "auto",
    kernel_options: Mapping[str, Any] | None = None,
    max_documents: int = 8,
    seed: int = 0,
    max_memory: int = DEFAULT_MEMORY,
) -> None:
    """Raise unless no document of a packed sequence sees another one. Entries of the batch are different documents, too.

    First the mask, exactly: no query of a document attends to a key of another one, for all of these ids, or for any, where
    algebra proves it. Then attention itself, by non-interference: query, key, value and incoming gradient of one document are
    replaced by other large values, and the outputs and the gradients of all others must not change in one bit (zeros of
    either sign are the same). That finds what is not in the mask: a layer that drops it, a score_mod or a kernel that mixes
    documents. One document is also changed while all others have scores far below zero, except in float16: a mask by -1e4
    instead of -inf hides nothing from a query whose scores are all below. A document's own results are required to change.

    A negative id is padding. Documents may not see padding, and may not depend on its values. What padding sees is nobody's
    concern: its outputs are not looked at, and no gradient comes in through them, as from a loss that ignores them. (With a
    gradient there, padding that sees a document would add to the gradients of that document.)

    Args:
        mask_mod: a function `(b, h, q_idx, kv_idx) -> bool`, or a block mask; None if `attention` has its own.
        document_ids: integers [S] or [B, S], the document of each token, or `Documents`.
        kv_document_ids: those of the keys, where they are another sequence: [KV] or [B, KV]. Default: the same.
        score_mod: function `(score, b, h, q_idx, kv_idx) -> score`.
        attention: a function `(query, key, value) -> out`, such as a layer of a model, that is run instead of
            `flex_attention`: query [B, heads, S, head_dim], key and value [B, kv_heads, KV, head_dim], out
            [B, heads, S, any]. Gradients are compared where its output requires grad.
        batch: entries of the batch, for ids [S]. Default: those of a block mask, else 1.
        heads, kv_heads, head_dim, dtype: of the tensors that are tried. Default: the heads of a block mask, else 2.
        device: of these tensors. Default: that of the mask's tensors, or of `document_ids`.
        backend, kernel_options: of `flex_attention`. Its deterministic kernels are asked for, as bits are compared.
        max_documents: how many are changed, one at a time: the first, the last, and others evenly between.
        seed: of the random values.
        max_memory: bytes of work memory for the mask.

    Raises:
        AssertionError: for a leak; says from which document into which one, at which element, and where to look.
        TypeError: for what is no mask, and where there is neither a mask nor an attention.
        ValueError: for ids that are no integers [S] or [B, S], for sizes that do not fit together, and for a mask that depends
            on the batch entry or the head, where `batch` or `heads` does not say how many there are.

    Non-interference is the notion of Goguen and Meseguer, "Security Policies and Security Models", 1982.

    Example:
        >>> import flexattn.testing
        >>> packed = flexattn.Documents.from_lengths([5, 3, 8])
        >>> flexattn.testing.assert_no_leak(packed.mask(flexattn.masks.causal_mask), packed)
        >>> flexattn.testing.assert_no_leak(flexattn.masks.causal_mask, packed)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        AssertionError: causal_mask lets document 1 see document 0: it attends at b=0, h=0, q_idx=5, kv_idx=0.
        ...
    """
    __tracebackhide__ = True
    if mask_mod is None and attention is None:
        raise TypeError("assert_no_leak needs a mask, or attention=, a function (query, key, value) -> out")
    if score_mod is not None and attention is not None:
        raise ValueError("score_mod is for flex_attention, which attention= replaces; give one of them")
    where = _device(mask_mod, document_ids) if device is None else torch.device(device)
    ids = _Ids.of(document_ids, kv_document_ids, where)
    sizes = _sizes(ids, mask_mod, (batch, heads, kv_heads), head_dim)
    if max_documents < 1:
        raise ValueError(f"max_documents is {max_documents!r}; it must be at least 1")
    if mask_mod is not None:
        function = mask_function("assert_no_leak", mask_mod, (sizes.B, sizes.Hq, sizes.L, sizes.S))
        unsaid = {"b": "batch="} if batch is None and ids.queries.dim() == 1 else {}
        unsaid |= {"h": "heads="} if heads is None else {}
        _check_mask(mask_mod, function, ids, sizes, max_memory, {} if isinstance(mask_mod, BlockMask) else unsaid)
    suspects = "`attention`" if mask_mod is None else "`attention`: the mask by itself keeps documents apart"
    if attention is None:
        given = {"block_mask" if isinstance(mask_mod, BlockMask) else "mask_mod": mask_mod}
        options = {"DETERMINISTIC": True, **(kernel_options or {})}
        attention = partial(
            flex_attention, score_mod=score_mod, enable_gqa=True, backend=backend, kernel_options=options, **given
        )
        suspects = "the score_mod, or report a fault of the kernel: the mask by itself keeps documents apart"
    rows = ids.expanded(sizes.B)
    experiment = Experiment(attention, sizes, dtype, where, seed, rows.queries >= 0)
    _check_results(experiment, rows, max_documents, suspects)


class _Ids(NamedTuple):
    """Documents of the queries and of the keys, each [S] or [B, S]."""

    queries: Tensor
    keys: Tensor

    @classmethod
    def of(cls, document_ids: Any, kv_document_ids: Any, device: torch.device) -> _Ids:
        found: list[Tensor] = []
        for name, ids in (("document_ids", document_ids), ("kv_document_ids", kv_document_ids)):
            if ids is None and name == "kv_document_ids":
                found.append(found[0])
                continue
            if isinstance(ids, Documents):
                ids = ids.seq_idx.squeeze(0)
            check_ids(name, ids)
            found.append(ids.to(device))
        check_same_dims("kv_document_ids", found[1], "document_ids", found[0])
        return cls(*found)

    def expanded(self, batch: int) -> _Ids:
        """With a batch dimension, on the CPU."""
        return _Ids(*(t.cpu().long().expand(batch, -1) for t in self))


def _sizes(ids: _Ids, mask: Any, given: tuple[int | None, int | None, int | None], head_dim: int) -> Sizes:
    batch, heads, kv_heads = given
    listed = mask.sizes if isinstance(mask, BlockMask) else (1, 1)
    rows = ids.queries.shape[0] if ids.queries.dim() == 2 else None
    if rows is not None and batch not in (None, rows):
        raise ValueError(f"batch={batch}, but document_ids has {rows} rows; leave batch out")
    batch = rows or (listed[0] if batch is None else batch)
    heads = (listed[1] if listed[1] > 1 else 2) if heads is None else heads
    kv_heads = heads if kv_heads is None else kv_heads
    sizes = Sizes(batch, heads, kv_heads, ids.queries.shape[-1], ids.keys.shape[-1], head_dim, head_dim)
    sizes.check()
    return sizes


def _device(mask: Any, document_ids: Any) -> torch.device:
    of_mask = torch.device("cpu") if mask is None else device_of("assert_no_leak", mask)
    ids = document_ids.document_ids if isinstance(document_ids, Documents) else document_ids
    return ids.device if of_mask.type == "cpu" and isinstance(ids, Tensor) else of_mask


# ---- the mask


@dataclass(frozen=True, eq=False, repr=False)
class _Across(MaskObject):
    """What a mask attends to across documents."""

    mask: MaskMod
    ids: _Ids

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        own = at(self.ids.queries, b, q_idx)
        return self.mask(b, h, q_idx, kv_idx) & (own >= 0) & (own != at(self.ids.keys, b, kv_idx))


def _check_mask(mask: Any, function: MaskMod, ids: _Ids, sizes: Sizes, memory: int, unsaid: Mapping[str, str]) -> None:
    __tracebackhide__ = True
    shape = (sizes.B, sizes.Hq, sizes.L, sizes.S)
    device = ids.queries.device
    leak = search(_Across(function, ids), shape, device, memory, unsaid)
    if leak.first is None:
        return
    b, h, q_idx, kv_idx = leak.first
    own, other = (int((t if t.dim() == 1 else t[b])[i]) for t, i in ((ids.queries, q_idx), (ids.keys, kv_idx)))
    entry = f" of b={b}" if ids.queries.dim() == 2 else ""
    seen = "padding" if other < 0 else f"document {other}"
    traced = TracedMask.of(function, device), TracedMask.of(_Across(function, ids), device)
    raise AssertionError(
        f"{called(mask)} lets document {own}{entry} see {seen}: it attends at b={b}, h={h}, q_idx={q_idx}, "
        f"kv_idx={kv_idx}.\n{leak.count:,} elements of (B, H, Q_LEN, KV_LEN) = {shape} attend to another document.\n\n"
        f"{drawn(traced, leak.first, shape, '.1?X', '1 attended   X a leak')}\n\n"
        "Combine the mask with the documents: and_masks(document_mask(ids), mask), or Documents.mask(mask). A mask that names "
        "them already: compare ids of the same batch entry, b, of the query with those of the key"
    )


# ---- outputs and gradients


class _Document(NamedTuple):
    """A document, of an entry of the batch; padding of all of them is one, without an id."""

    b: int
    id: int | None

    def __str__(self) -> str:
        return "padding" if self.id is None else f"document {self.id} of b={self.b}"

    def positions(self, ids: _Ids) -> Positions:
        return Positions(*(self._inside(t) for t in ids))

    def _inside(self, ids: Tensor) -> Tensor:
        if self.id is None:
            return ids < 0
        row = torch.arange(len(ids)).view(-1, 1) == self.b
        return row & (ids == self.id)


def _chosen(ids: _Ids, most: int) -> list[_Document]:
    """The documents that are changed: at most so many, evenly among all in their order, and padding."""
    found = [_Document(b, n) for b, row in enumerate(ids.queries.tolist()) for n in dict.fromkeys(row) if n >= 0]
    if len(found) > most:
        found = [found[round(i * (len(found) - 1) / max(most - 1, 1))] for i in range(most)]
    has_padding = any(bool((t < 0).any()) for t in ids)
    return found + ([_Document(0, None)] if has_padding else [])


def _check_results(experiment: Experiment, ids: _Ids, most: int, suspects: str) -> None:
    __tracebackhide__ = True
    real = Positions(ids.queries >= 0, ids.keys >= 0)
    own: set[str] = set()
    documents = _chosen(ids, most)
    for document in documents:
        inside = document.positions(ids)
        after = experiment.run(inside)
        changes = experiment.changes(after, ~inside & real)
        if changes:
            raise AssertionError(_leak(document, changes, ids, suspects))
        own |= {change.name for change in experiment.changes(after, inside & real)}
    expected = {"out"} if experiment.before.dq is None else {"out", "a gradient"}
    own |= {"a gradient"} if own - {"out"} else set()
    if any(d.id is not None for d in documents) and not expected <= own:
        raise AssertionError(
            f"{' and '.join(sorted(expected - own))} of no document changed when its own query, key, value and incoming "
            "gradient did: the attention does not depend on its inputs, or no document attends to itself, so that nothing was "
            "tested"
        )
    _check_large(experiment, ids, documents, suspects)


def _check_large(experiment: Experiment, ids: _Ids, documents: list[_Document], suspects: str) -> None:
    """The first document changes while all others have large values, and scores far below zero.

    A mask by a large number, -1e4 instead of -inf, hides the others only from a query that has a score above it.
    """
    __tracebackhide__ = True
    if not documents or experiment.dtype is torch.float16:  # whose products of large values overflow
        return
    real, inside = Positions(ids.queries >= 0, ids.keys >= 0), documents[0].positions(ids)
    large, after = (experiment.run(changed, opposed=True) for changed in (real, ~inside & real))
    changes = experiment.changes(after, ~inside & real, large)
    if changes:
        told = (
            f"{suspects}. All others had scores far below zero here: a mask by -1e4 hides nothing from them, -inf does"
        )
        raise AssertionError(_leak(documents[0], changes, ids, told))


def _leak(document: _Document, changes: list[Change], ids: _Ids, suspects: str) -> str:
    first = changes[0]
    b, _, position, _ = first.at
    of = ids.queries if first.name in ("out", "dq") else ids.keys
    into = _Document(b, int(of[b, position]))
    counts = ", ".join(f"{change.count:,} of {change.name}" for change in changes)
    return (
        f"{document} leaks into {into}.\n{first} once query, key, value and incoming gradient of {document} are others.\n"
        f"Elements of other documents that changed: {counts}.\nLook at {suspects}"
    )
