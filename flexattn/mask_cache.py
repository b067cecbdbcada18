"""Block masks built for `flex_attention(mask_mod=...)`, kept as long as what they were built from is unchanged.

A mask is found again by its program, its shape, and the identity and version of every tensor it captured, so a new
closure of the same code over the same tensors costs nothing, and a tensor that was written to builds a new mask.
(Writing through `tensor.data` does not change the version, as autograd does not see it either.)
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .block_mask import BlockMask
from .codegen.pipeline import variant
from .codegen.private import modes_are_active, version_of
from .codegen.trace_cache import cached_trace
from .create import create_block_mask
from .notices import say_rebuilt_mask

CAPACITY = 64

_Entry = tuple[tuple["weakref.ref[Tensor]", ...], BlockMask]
_cache: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
_lock = threading.Lock()


def cached_block_mask(
    mask_mod: Callable[..., Tensor], query: Tensor, key: Tensor, in_advance: bool = True
) -> BlockMask:
    """The block mask of `mask_mod` for these tensors; B and H are 1 where it does not depend on them.

    `in_advance`: whether the caller could have built it outside of compiled code, which is then said.
    """
    B, H, L, S = query.shape[0], query.shape[1], query.shape[2], key.shape[2]
    if torch.compiler.is_compiling():
        if in_advance:
            say_rebuilt_mask()
        return create_block_mask(mask_mod, B, H, L, S, device=query.device)
    if modes_are_active():  # what is built then may be fake, or a transform's
        return create_block_mask(mask_mod, B, H, L, S, device=query.device)
    program, captured, ints = cached_trace(None, mask_mod, device=query.device)
    parsed = variant(program)
    axes = frozenset() if parsed.mask is None else parsed.mask.axes
    B, H = (B if "b" in axes else 1), (H if "h" in axes else 1)
    tensors = captured[: len(captured) - parsed.n_floats]
    floats = tuple(float(t) for t in captured[len(tensors) :])
    if any(t.is_inference() for t in tensors):  # no version to tell a write by
        return create_block_mask(mask_mod, B, H, L, S, device=query.device)
    versions = tuple((id(t), version_of(t)) for t in tensors)
    place = (program, B, H, L, S, query.device, floats, tuple(ints), versions)
    found = _cache.get(place)
    if found is not None and all(ref() is t for ref, t in zip(found[0], tensors, strict=True)):
        with _lock:
            if place in _cache:
                _cache.move_to_end(place)
        # The mask's blocks are the same; its elements are masked by the closure of this call.
        return found[1].with_mask_mod(mask_mod)
    mask = create_block_mask(mask_mod, B, H, L, S, device=query.device)
    with _lock:
        _cache[place] = (tuple(weakref.ref(t) for t in tensors), mask.with_mask_mod(None))
        while len(_cache) > CAPACITY:
            _cache.popitem(last=False)
    return mask
