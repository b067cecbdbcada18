"""Ready-made mask_mods, and how to combine them. A mask_mod takes (b, h, q_idx, kv_idx); True means: attend.

A name that says what is attended is itself a mask_mod (`causal_mask`, `noop_mask`); a name that takes parameters returns
one (`sliding_window(256)`). All are small callable objects: they print well, compare by identity, can be pickled, and
move to another device with their tensors by `.to(device)`. Pictures show which keys (columns) a query (row) attends to.

Positions count from 0 at the start of both sequences: nothing here knows the lengths. Where the queries are the last
positions of a longer sequence, as in decoding with a cache, write `causal.bottom_right(Q_LEN, KV_LEN)`.

Example:
    >>> import flexattn
    >>> mask = flexattn.and_masks(flexattn.masks.causal_mask, flexattn.masks.chunked(2))
    >>> flexattn.create_mask(mask, None, None, 4, 4)[0, 0].int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
"""

from __future__ import annotations

from ..mask_object import MaskMod as MaskMod
from .combine import and_masks, noop_mask, not_mask, or_masks
from .diffusion import block_diffusion
from .distances import causal, causal_mask, chunked, dilated, sliding_window, streaming, window
from .images import natten_2d, transfusion
from .keys import global_tokens, padding, prefix_lm
from .packed import document_mask, shared_prefix
from .trees import tree

__all__ = [
    "and_masks",
    "block_diffusion",
    "causal",
    "causal_mask",
    "chunked",
    "dilated",
    "document_mask",
    "global_tokens",
    "natten_2d",
    "noop_mask",
    "not_mask",
    "or_masks",
    "padding",
    "prefix_lm",
    "shared_prefix",
    "sliding_window",
    "streaming",
    "transfusion",
    "tree",
    "window",
]
