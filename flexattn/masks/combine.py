"""The combinations of mask_mods: all of them, any of them, not this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..mask_object import MaskMod, MaskObject, name_of


def noop_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Everything is attended: `True`.

        1 1 1
        1 1 1

    Example:
        >>> import flexattn
        >>> flexattn.create_mask(flexattn.noop_mask, None, None, 2, 3)[0, 0].int().tolist()
        [[1, 1, 1], [1, 1, 1]]
    """
    return b.new_ones((), dtype=torch.bool)


@dataclass(frozen=True, eq=False, repr=False)
class _All(MaskObject):
    masks: tuple[MaskMod, ...]

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        result = self.masks[0](b, h, q_idx, kv_idx)
        for mask in self.masks[1:]:
            result = result & mask(b, h, q_idx, kv_idx)
        return result

    def __repr__(self) -> str:
        return f"and_masks({', '.join(map(name_of, self.masks))})"


@dataclass(frozen=True, eq=False, repr=False)
class _Any(MaskObject):
    masks: tuple[MaskMod, ...]

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        result = self.masks[0](b, h, q_idx, kv_idx)
        for mask in self.masks[1:]:
            result = result | mask(b, h, q_idx, kv_idx)
        return result

    def __repr__(self) -> str:
        return f"or_masks({', '.join(map(name_of, self.masks))})"


@dataclass(frozen=True, eq=False, repr=False)
class _Not(MaskObject):
    mask: MaskMod

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ~self.mask(b, h, q_idx, kv_idx)

    def __repr__(self) -> str:
        return f"not_mask({name_of(self.mask)})"


def check_callable(function: str, masks: tuple[Any, ...]) -> None:
    """Raise unless all of the masks that `function` was given can be called."""
    for mask in masks:
        if not callable(mask):
            raise TypeError(
                f"{function} takes mask functions (b, h, q_idx, kv_idx) -> bool, got {type(mask).__name__}. To use a "
                "tensor, index it in a function: lambda b, h, q_idx, kv_idx: t[b, h, q_idx, kv_idx]"
            )


def and_masks(*mask_mods: MaskMod) -> MaskMod:
    """Attended where every one of the masks attends; everywhere for none.

    Example:
        >>> import flexattn
        >>> flexattn.and_masks(flexattn.masks.causal_mask, flexattn.masks.chunked(64))
        and_masks(causal_mask, chunked(size=64))
    """
    check_callable("and_masks", mask_mods)
    return _All(mask_mods) if mask_mods else noop_mask


def or_masks(*mask_mods: MaskMod) -> MaskMod:
    """Attended where at least one of the masks attends; nowhere for none.

    Example:
        >>> import flexattn
        >>> flexattn.or_masks(flexattn.masks.sliding_window(2), flexattn.masks.prefix_lm(1))
        or_masks(sliding_window(size=2), prefix_lm(prefix_length=1))
    """
    check_callable("or_masks", mask_mods)
    return _Any(mask_mods) if mask_mods else _Not(noop_mask)


def not_mask(mask_mod: MaskMod) -> MaskMod:
    """Attended where the mask does not attend.

    Example:
        >>> import flexattn
        >>> flexattn.create_mask(flexattn.not_mask(flexattn.masks.causal_mask), None, None, 2, 2)[0, 0].int().tolist()
        [[0, 1], [0, 0]]
    """
    check_callable("not_mask", (mask_mod,))
    return mask_mod.mask if isinstance(mask_mod, _Not) else _Not(mask_mod)
