"""Block masks as trees of tensors, for torch.compile and torch.export."""

from __future__ import annotations

from typing import Any, NamedTuple

from .block_mask import BlockMask
from .codegen.private import GetAttrKey, register_pytree_node
from .listed_blocks import LISTS
from .mask_object import MaskMod


class _Context(NamedTuple):
    seq_lengths: tuple[int, int]
    block_size: tuple[int, int]
    mask_mod: MaskMod
    is_exact: bool
    sizes: tuple[int, int]
    only_first: tuple[bool, bool]


def _flatten(mask: BlockMask) -> tuple[list[Any], _Context]:
    context = _Context(mask.seq_lengths, mask.BLOCK_SIZE, mask.mask_mod, mask.is_exact, mask.sizes, mask.only_first)
    return [getattr(mask, name) for name in LISTS], context


def _flatten_with_keys(mask: BlockMask) -> tuple[list[tuple[Any, Any]], _Context]:
    leaves, context = _flatten(mask)
    return [(GetAttrKey(n), leaf) for n, leaf in zip(LISTS, leaves, strict=True)], context


def _unflatten(leaves: Any, context: _Context) -> BlockMask:
    # Leaves need not be tensors while trees are compared.
    made = object.__new__(BlockMask)
    made.seq_lengths, made.BLOCK_SIZE, made.mask_mod = context.seq_lengths, context.block_size, context.mask_mod
    made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices = leaves
    made._columns, made._adjacent = {}, None
    made._sizes, made.only_first = context.sizes, context.only_first
    made._described = context.mask_mod if context.is_exact else None
    return made


register_pytree_node(
    BlockMask,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="flexattn.BlockMask",
)
