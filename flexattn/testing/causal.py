"""`assert_causal`: nothing is seen of the future, by a mask or by a layer of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..codegen.tiles import DEFAULT_MEMORY
from ..mask_object import MaskObject
from ..masks.parameters import at, check_ids, is_integer
from .interference import Attention, Change, Experiment, Positions
from .mask_picture import drawn
from .search import search
from .sizes import Sizes, mask_shape, unsaid_in
from .traced_mask import MaskMod, Shape, TracedMask, called, device_of, mask_function

_LENGTH = 256  # of a mask and an attention where nothing says one
_MOST = 32  # ends of images at which an attention is examined
_EDGES = (16, 32, 64, 128, 256, 512, 1024)  # sizes of blocks, where kernels change their ways


def assert_causal(
    mask_mod: MaskMod | BlockMask | None = None,
    shape: int | tuple[int, ...] | None = None,
    *,
    attention: Attention | None = None,
    within: Tensor | None = None,
    offset: int = 0,
    kv_heads: int | None = None,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    seed: int = 0,
    max_memory: int = DEFAULT_MEMORY,
) -> None:
    """Raise unless no query sees a key after it: none with `kv_idx > q_idx + offset`.

    A mask is examined exactly, for a shape, or for all where algebra proves it. An attention, such as a layer of a model, is
    run: query, key and value from some position on are replaced by other large values, and the outputs before it must not
    change in one bit (zeros of either sign are the same). Positions are the first, the middle, the last, the keys after the
    last query, and the edges of blocks; so this finds a mask that is lost or shifted, and may miss one that is wrong at a
    single place between.

    Args:
        mask_mod: a function `(b, h, q_idx, kv_idx) -> bool`, or a block mask.
        shape: a length, (Q_LEN, KV_LEN), or (B, H, Q_LEN, KV_LEN). Default: that of the block mask, the length of `within`, or
            256.
        attention: a function `(query, key, value) -> out` that is examined: query [B, H, Q_LEN, head_dim], key and value
            [B, kv_heads, KV_LEN, head_dim], out [B, H, Q_LEN, any]. Give it alone, or beside the mask it should have.
        within: integers [S] or [B, S]: positions with the same id, 0 or more, may see each other both ways, as those of an
            image in `masks.transfusion`; negative for none.
        offset: the position of the first query among the keys, as that of `masks.causal`.
        kv_heads, head_dim, dtype, device, seed: of the tensors that an attention is tried with.
        max_memory: bytes of work memory for the mask.

    Raises:
        AssertionError: if something is seen of the future; says by which query, of which key.
        TypeError: for what is no mask, and where there is neither a mask nor an attention.
        ValueError: for sizes that do not fit together, and for a mask that depends on the batch entry or the head, where
            `shape` does not say how many there are.

    Example:
        >>> import flexattn.testing
        >>> flexattn.testing.assert_causal(flexattn.masks.sliding_window(64))
        >>> flexattn.testing.assert_causal(attention=flexattn.flex_attention, shape=32)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        AssertionError: flex_attention: query 0 sees key 1.
        ...
    """
    __tracebackhide__ = True
    if mask_mod is None and attention is None:
        raise TypeError("assert_causal needs a mask, or attention=, a function (query, key, value) -> out")
    if device is None:
        device = "cpu" if mask_mod is None else device_of("assert_causal", mask_mod)
    where = torch.device(device)
    if not is_integer(offset) or (within is not None and offset < 0):
        raise ValueError(f"offset is {offset!r}; it must be an int, and 0 or more beside within=")
    if within is not None:
        check_ids("within", within)
        within = within.to(where)
    sizes = _shape(mask_mod, shape, within, offset)
    if mask_mod is not None:
        unsaid = {} if isinstance(mask_mod, BlockMask) else unsaid_in(shape)
        if within is not None and within.dim() == 2:
            unsaid.pop("b", None)
        _check_mask(mask_mod, sizes, within, offset, where, max_memory, unsaid)
    if attention is not None:
        B, H, L, S = sizes
        problem = Sizes(B, H, kv_heads or H, L, S, head_dim, head_dim)
        problem.check()
        _Layer(attention, Experiment(attention, problem, dtype, where, seed, backward=False), within, offset).check()


def _shape(mask: Any, shape: Any, within: Tensor | None, offset: int) -> Shape:
    if shape is not None:
        sizes = mask_shape(shape)
    elif isinstance(mask, BlockMask):
        sizes = (*mask.sizes, *mask.seq_lengths)
    else:
        sizes = mask_shape(_LENGTH if within is None else within.shape[-1])
    if within is None:
        return sizes
    if within.dim() == 2 and sizes[0] == 1:
        sizes = (len(within), *sizes[1:])
    if within.shape[-1] < max(sizes[2] + offset, sizes[3]) or (within.dim() == 2 and len(within) != sizes[0]):
        raise ValueError(
            f"within is [{', '.join(map(str, within.shape))}], for (B, H, Q_LEN, KV_LEN) = {sizes}; give an id for each "
            "position, [S], or [B, S] with the same B"
        )
    return sizes


# ---- the mask


@dataclass(frozen=True, eq=False, repr=False)
class _Future(MaskObject):
    """What a mask attends to after the query, and outside of what may see itself."""

    mask: MaskMod
    within: Tensor | None
    offset: int

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        seen = self.mask(b, h, q_idx, kv_idx) & (kv_idx > q_idx + self.offset)
        if self.within is None:
            return seen
        own = at(self.within, b, q_idx + self.offset)
        return seen & ~((own >= 0) & (own == at(self.within, b, kv_idx)))


def _check_mask(
    mask: Any,
    shape: Shape,
    within: Tensor | None,
    offset: int,
    device: torch.device,
    memory: int,
    unsaid: Mapping[str, str],
) -> None:
    __tracebackhide__ = True
    function = mask_function("assert_causal", mask, shape)
    future = _Future(function, within, offset)
    found = search(future, shape, device, memory, unsaid)
    if found.first is None:
        return
    b, h, q_idx, kv_idx = found.first
    ids = "" if within is None else f", ids {_id(within, b, q_idx + offset)} and {_id(within, b, kv_idx)} of `within`"
    traced = TracedMask.of(function, device), TracedMask.of(future, device)
    raise AssertionError(
        f"{called(mask)} is not causal: it attends at b={b}, h={h}, q_idx={q_idx}, kv_idx={kv_idx}{ids}.\n"
        f"{found.count:,} elements of (B, H, Q_LEN, KV_LEN) = {shape} attend to what comes later"
        f"{f' than q_idx + {offset}' if offset else ''}.\n\n"
        f"{drawn(traced, found.first, shape, '.1?X', '1 attended   X attended too early')}\n\n"
        "Combine the mask with causal_mask: and_masks(causal_mask, mask). Where positions may see each other both ways, as "
        "those of an image, give their ids as within=; where queries start later than keys, give offset="
    )


def _id(ids: Tensor, b: int, position: int) -> int:
    return int((ids if ids.dim() == 1 else ids[b])[position])


# ---- an attention


@dataclass
class _Layer:
    """An attention that is examined."""

    attention: Attention
    experiment: Experiment
    within: Tensor | None
    offset: int

    def check(self) -> None:
        __tracebackhide__ = True
        _, _, _, L, S, *_ = self.experiment.sizes
        last = L if S > max(0, L + self.offset) else L - 1  # keys after the last query are its future
        edges = [n + step for n in _EDGES for step in (0, 1)] + self._ends()
        depends = False
        for start in sorted({t for t in (1, 2, L // 2, L - 1, L, *edges) if 0 < t <= last}):
            changed = self._from(start)
            after = self.experiment.run(changed)
            found = self.experiment.changes(after, self._settled(start))
            if found:
                raise AssertionError(self._report(found[0], start))
            depends = depends or bool(self.experiment.changes(after, changed))
        if not depends and L > 1:
            raise AssertionError(
                f"{called(self.attention)}: no output changed when query, key and value did. It does not depend on its inputs, "
                "or attends to nothing, so that nothing was tested"
            )

    def _ends(self) -> list[int]:
        """The queries at which what may see itself begins or ends, one of them and one after; at most `_MOST` evenly chosen."""
        if self.within is None:
            return []
        ids = self.within.cpu().view(-1, self.within.shape[-1])
        places = (ids[:, 1:] != ids[:, :-1]).any(0).nonzero().view(-1) + 1 - self.offset
        chosen = places[torch.linspace(0, len(places) - 1, min(len(places), _MOST)).round().long()]
        return [int(n) + step for n in chosen for step in (0, 1)]

    def _from(self, start: int) -> Positions:
        """The queries from `start` on, and the keys that come after all queries before it."""
        B, _, _, L, S, *_ = self.experiment.sizes
        queries, keys = torch.arange(L) >= start, torch.arange(S) >= start + self.offset
        return Positions(queries.expand(B, L), keys.expand(B, S))

    def _settled(self, start: int) -> Positions:
        """The queries before `start` that may see nothing from there on: not those of an image that goes on."""
        B, _, _, L, S, *_ = self.experiment.sizes
        settled = (torch.arange(L) < start).expand(B, L)
        if self.within is not None:
            own = self._ids(L, self.offset)
            later = self._ids(S, 0)[:, max(0, start + self.offset) :]
            goes_on = (own.unsqueeze(-1) == later.unsqueeze(-2)).any(-1) & (own >= 0)
            settled = settled & ~goes_on
        return Positions(settled, torch.zeros(B, S, dtype=torch.bool))

    def _ids(self, length: int, start: int) -> Tensor:
        assert self.within is not None
        return self.within.cpu().expand(self.experiment.sizes.B, -1)[:, start : start + length]

    def _report(self, change: Change, start: int) -> str:
        b, _, query, _ = change.at
        key = self._key(b, query)
        if key is None:
            what, where = f"query {query} sees what comes after it", f"query, key and value from {start} on are others"
        else:
            what, where = f"query {query} sees key {key[0]}", f"what stands at kv_idx={key[0]} is another"
            change = key[1]
        return (
            f"{called(self.attention)}: {what}.\n{change} once {where}.\nIf it is a layer of a model, look whether it was "
            "given its mask: many fall back to full attention where none is passed"
        )

    def _key(self, b: int, query: int) -> tuple[int, Change] | None:
        """The first key after a query that changes its output, by bisection: keys up to it do, those before do not."""
        B, _, _, L, S, *_ = self.experiment.sizes
        first = query + self.offset + 1
        allowed = torch.zeros(S, dtype=torch.bool)
        if self.within is not None:
            own = self._ids(L, self.offset)[b, query]
            allowed = (self._ids(S, 0)[b] == own) & (own >= 0)
        only = torch.zeros(B, L, dtype=torch.bool)
        only[b, query] = True

        def changed(stop: int, start: int = first) -> Change | None:
            """What keys `start` to `stop - 1`, and the queries at their places, change."""
            keys = torch.arange(S)
            keys = (keys >= start) & (keys < stop) & ~allowed
            queries = torch.zeros(L, dtype=torch.bool)
            places = keys.nonzero().view(-1) - self.offset
            queries[places[(places >= 0) & (places < L)]] = True
            after = self.experiment.run(Positions(queries.expand(B, L), keys.expand(B, S)))
            found = self.experiment.changes(after, Positions(only, torch.zeros(B, S, dtype=torch.bool)))
            return found[0] if found else None

        low, high = first, S  # keys before `low` change nothing, those before `high` do
        if changed(high) is None:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if changed(middle) else (middle, high)
        alone = changed(high, high - 1)
        return None if alone is None else (high - 1, alone)
