"""Ready-made mask_mods, and how to combine them. A mask_mod takes (b, h, q_idx, kv_idx); True means: attend.

A name that says what is attended is itself a mask_mod (`causal_mask`, `noop_mask`); a name that takes parameters returns
one (`sliding_window(256)`). All are small callable objects: they print well, compare by identity and can be pickled.
Pictures show which keys (columns) a query (row) attends to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .mask_object import MaskObject, name_of

MaskMod = Callable[..., Tensor]

__all__ = [
    "and_masks",
    "causal",
    "causal_mask",
    "chunked",
    "document_mask",
    "noop_mask",
    "not_mask",
    "or_masks",
    "padding",
    "prefix_lm",
    "sliding_window",
    "window",
]


def noop_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Everything is attended."""
    return b.new_ones((), dtype=torch.bool)


def causal_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """`q_idx >= kv_idx`: a query attends to itself and to what comes before it, counted from the start of both.

        1 . . .
        1 1 . .
        1 1 1 .

    Lengths that differ are aligned at the top left, as in PyTorch's `is_causal`; FlashAttention aligns them at the
    bottom right: use `causal(KV_LEN - Q_LEN)` for that.

    Example:
        >>> import flexattn
        >>> flexattn.create_mask(flexattn.masks.causal_mask, None, None, 2, 3)[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0]]
    """
    return q_idx >= kv_idx


def _check_integers(what: str, value: Any, dims: tuple[int, ...], expected: str) -> None:
    """Raise unless `value` is an integer tensor of so many dimensions, or an int where none are among them."""
    if isinstance(value, Tensor):
        fits = value.dim() in dims and not (
            value.is_floating_point() or value.is_complex() or value.dtype is torch.bool
        )
    else:
        fits = 0 in dims and isinstance(value, (int, torch.SymInt))
    if not fits:
        got = f"a {value.dtype} tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{what} must be {expected}; got {got}")


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


def _check_callable(function: str, masks: tuple[Any, ...]) -> None:
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
    _check_callable("and_masks", mask_mods)
    return _All(mask_mods) if mask_mods else noop_mask


def or_masks(*mask_mods: MaskMod) -> MaskMod:
    """Attended where at least one of the masks attends; nowhere for none.

    Example:
        >>> import flexattn
        >>> flexattn.or_masks(flexattn.masks.sliding_window(2), flexattn.masks.prefix_lm(1))
        or_masks(sliding_window(size=2), prefix_lm(prefix_length=1))
    """
    _check_callable("or_masks", mask_mods)
    return _Any(mask_mods) if mask_mods else _Not(noop_mask)


def not_mask(mask_mod: MaskMod) -> MaskMod:
    """Attended where the mask does not attend.

    Example:
        >>> import flexattn
        >>> flexattn.create_mask(flexattn.not_mask(flexattn.masks.causal_mask), None, None, 2, 2)[0, 0].int().tolist()
        [[0, 1], [0, 0]]
    """
    _check_callable("not_mask", (mask_mod,))
    return mask_mod.mask if isinstance(mask_mod, _Not) else _Not(mask_mod)


@dataclass(frozen=True, eq=False, repr=False)
class causal(MaskObject):
    """Causal with an offset: `q_idx + offset >= kv_idx`.

    `offset = KV_LEN - Q_LEN` aligns the last query with the last key (bottom right), which is what decoding with a
    cache of earlier keys needs. Picture of 2 queries and 4 keys with offset 2:

        1 1 1 .
        1 1 1 1

    Args:
        offset: position of the first query among the keys: an int, a 0-d tensor, or one for each batch entry, [B].

    Example:
        >>> import flexattn
        >>> flexattn.create_mask(flexattn.masks.causal(2), None, None, 2, 4)[0, 0].int().tolist()
        [[1, 1, 1, 0], [1, 1, 1, 1]]
    """

    offset: int | Tensor = 0

    def __post_init__(self) -> None:
        _check_integers("offset", self.offset, (0, 1), "an int, or an integer tensor: 0-d, or [B]")

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        return q_idx + _per_batch(self.offset, b) >= kv_idx


def _per_batch(value: Any, b: Tensor) -> Any:
    return value[b] if isinstance(value, Tensor) and value.dim() == 1 else value


@dataclass(frozen=True, eq=False, repr=False)
class sliding_window(MaskObject):
    """The last `size` keys, the query's own among them: `0 <= q_idx - kv_idx < size`.

    With size 2:

        1 . . .
        1 1 . .
        . 1 1 .
        . . 1 1

    Mistral and Hugging Face count the same way. FlashAttention's `window_size=(w, 0)` does not count the query itself:
    it is `sliding_window(w + 1)`.

    Args:
        size: keys in the window, at least 1.

    Example:
        >>> import flexattn
        >>> flexattn.create_mask(flexattn.masks.sliding_window(2), None, None, 3, 3)[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(
                f"sliding_window({self.size}) attends to nothing; the size counts the query's own position"
            )

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        distance = q_idx - kv_idx
        return (distance >= 0) & (distance < self.size)


@dataclass(frozen=True, eq=False, repr=False)
class window(MaskObject):
    """`left` keys before the query, itself, and `right` keys after it: `-right <= q_idx - kv_idx <= left`.

    With left 1 and right 1:

        1 1 . .
        1 1 1 .
        . 1 1 1

    FlashAttention's `window_size=(left, right)`, for equal lengths.

    Args:
        left: keys before the query, at least 0.
        right: keys after it, at least 0.

    Example:
        >>> import flexattn
        >>> flexattn.create_mask(flexattn.masks.window(1, 1), None, None, 3, 4)[0, 0].int().tolist()
        [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]
    """

    left: int
    right: int

    def __post_init__(self) -> None:
        if self.left < 0 or self.right < 0:
            raise ValueError(
                f"window({self.left}, {self.right}): both sides must be 0 or more; None for no limit is causal()"
            )

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        distance = q_idx - kv_idx
        return (distance <= self.left) & (distance >= -self.right)


@dataclass(frozen=True, eq=False, repr=False)
class prefix_lm(MaskObject):
    """A prefix that all attend to, causal after it: `kv_idx < prefix_length or q_idx >= kv_idx`.

    With a prefix of 2:

        1 1 . .
        1 1 . .
        1 1 1 .
        1 1 1 1

    Args:
        prefix_length: an int, a 0-d tensor, or one for each batch entry, [B].

    Source: Raffel et al., 2020 (T5), section 3.2.

    Example:
        >>> import flexattn
        >>> flexattn.create_mask(flexattn.masks.prefix_lm(2), None, None, 3, 3)[0, 0].int().tolist()
        [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """

    prefix_length: int | Tensor

    def __post_init__(self) -> None:
        _check_integers("prefix_length", self.prefix_length, (0, 1), "an int, or an integer tensor: 0-d, or [B]")

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        return (kv_idx < _per_batch(self.prefix_length, b)) | (q_idx >= kv_idx)


@dataclass(frozen=True, eq=False, repr=False)
class document_mask(MaskObject):
    """Only within the same document of a packed sequence: `document_ids[q_idx] == document_ids[kv_idx]`.

    With ids 0 0 1 1 (combine it with `causal_mask` by `and_masks`):

        1 1 . .
        1 1 . .
        . . 1 1
        . . 1 1

    Args:
        document_ids: integers, [S], or [B, S] for a different packing in each batch entry. Queries and keys are the
            same sequence.

    Example:
        >>> import torch, flexattn
        >>> ids = torch.tensor([0, 0, 1])
        >>> flexattn.create_mask(flexattn.masks.document_mask(ids), None, None, 3, 3)[0, 0].int().tolist()
        [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """

    document_ids: Tensor

    def __post_init__(self) -> None:
        ids = self.document_ids
        if not isinstance(ids, Tensor) or ids.dim() not in (1, 2) or ids.is_floating_point():
            raise ValueError("document_ids must be an integer tensor [S] or [B, S]")

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        if self.document_ids.dim() == 1:
            return self.document_ids[q_idx] == self.document_ids[kv_idx]
        return self.document_ids[b, q_idx] == self.document_ids[b, kv_idx]

    def __repr__(self) -> str:
        return f"document_mask({list(self.document_ids.shape)})"


@dataclass(frozen=True, eq=False, repr=False)
class padding(MaskObject):
    """Only real keys of a padded batch: `kv_idx < lengths[b]`. Rows of padded queries still attend to the real keys.

    With length 2:

        1 1 . .
        1 1 . .
        1 1 . .

    Args:
        lengths: integers [B], the number of real keys of each batch entry; build its block mask with this B.

    Example:
        >>> import torch, flexattn
        >>> flexattn.create_mask(flexattn.masks.padding(torch.tensor([1, 2])), 2, None, 1, 3)[:, 0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0]]
    """

    lengths: Tensor

    def __post_init__(self) -> None:
        _check_integers("lengths", self.lengths, (1,), "an integer tensor [B]")

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        return kv_idx < self.lengths[b]


@dataclass(frozen=True, eq=False, repr=False)
class chunked(MaskObject):
    """Within chunks of `size` positions: `q_idx // size == kv_idx // size`. Not causal by itself.

    With size 2:

        1 1 . .
        1 1 . .
        . . 1 1

    Llama 4 combines it with `causal_mask`.

    Args:
        size: positions of a chunk, at least 1.

    Example:
        >>> import flexattn
        >>> flexattn.create_mask(flexattn.masks.chunked(2), None, None, 3, 3)[0, 0].int().tolist()
        [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"chunked({self.size}): a chunk has at least one position")

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        return q_idx // self.size == kv_idx // self.size
