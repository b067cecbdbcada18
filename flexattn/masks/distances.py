"""The masks of a distance: a query at `q_idx` sees keys so far before or after it. All but `causal` count from the start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..mask_object import MaskObject
from .parameters import check_integers, check_size, described, is_integer, per_batch


def causal_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """`q_idx >= kv_idx`: a query attends to itself and to what comes before it, counted from the start of both.

        1 . . .
        1 1 . .
        1 1 1 .

    Lengths that differ are aligned at the top left: see `causal` for who does otherwise.

    Example:
        >>> import flexattn
        >>> flexattn.create_mask(flexattn.masks.causal_mask, None, None, 2, 3)[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0]]
    """
    return q_idx >= kv_idx


@dataclass(frozen=True, eq=False, repr=False)
class causal(MaskObject):
    """Causal with an offset: `q_idx + offset >= kv_idx`.

    The default, 0, aligns the first query with the first key (top left). `offset = KV_LEN - Q_LEN`, which
    `causal.bottom_right(Q_LEN, KV_LEN)` computes, aligns the last query with the last key (bottom right), which is what
    decoding with a cache of earlier keys needs. 2 queries and 4 keys, with offset 0 and 2:

        1 . . .        1 1 1 .
        1 1 . .        1 1 1 1

    Equal lengths are the same for everybody. For others:

    - top left: `is_causal` of PyTorch's `scaled_dot_product_attention` and its `causal_upper_left`, `LowerTriangularMask`
      of xFormers, `CausalMask` of JAX Splash, which has an `offset` of the same meaning as here;
    - bottom right: FlashAttention since 2.1, FlashInfer, PyTorch's `causal_lower_right`,
      `LowerTriangularFromBottomRightMask` of xFormers. Hugging Face counts queries from the length of the cache, the same.

    A negative offset, for more queries than keys, leaves the first queries without any key: their output is 0.

    Args:
        offset: position of the first query among the keys: an int, a 0-d tensor, or one for each batch entry, [B].

    Raises:
        ValueError: for an offset that is no integer, or has more dimensions.

    Example:
        >>> import flexattn
        >>> flexattn.create_mask(flexattn.masks.causal(2), None, None, 2, 4)[0, 0].int().tolist()
        [[1, 1, 1, 0], [1, 1, 1, 1]]
        >>> flexattn.masks.causal.bottom_right(2, 4)
        causal(offset=2)
    """

    offset: int | Tensor = 0

    def __post_init__(self) -> None:
        check_integers("offset", self.offset, (0, 1), "an int, or an integer tensor: 0-d, or [B]")

    @classmethod
    def bottom_right(cls, Q_LEN: int | Tensor, KV_LEN: int | Tensor) -> causal:
        """The last query aligned with the last key: `causal(KV_LEN - Q_LEN)`. Lengths may be tensors, 0-d or [B].

        With tensors the offset is a new tensor each time: keep the mask, so that what was built for it is found again.

        Example:
            >>> import torch, flexattn
            >>> mask = flexattn.masks.causal.bottom_right(1, torch.tensor([2, 3]))
            >>> flexattn.create_mask(mask, 2, None, 1, 3)[:, 0, 0].int().tolist()
            [[1, 1, 0], [1, 1, 1]]
        """
        for name, length in (("Q_LEN", Q_LEN), ("KV_LEN", KV_LEN)):
            check_integers(name, length, (0, 1), "an int, or an integer tensor: 0-d, or [B]")
        return cls(KV_LEN - Q_LEN)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        return q_idx + per_batch(self.offset, b) >= kv_idx


@dataclass(frozen=True, eq=False, repr=False)
class sliding_window(MaskObject):
    """The last `size` keys, the query's own among them: `0 <= q_idx - kv_idx < size`.

    With size 2:

        1 . . .
        1 1 . .
        . 1 1 .
        . . 1 1

    Mistral, Hugging Face (`sliding_window_overlay`) and torchtitan (`get_sliding_window_mask_mod`) count the same way.
    Others do not count the query itself, and are `sliding_window(w + 1)`: `generate_sliding_window(w)` of PyTorch's
    attention-gym, `window_size=(w, 0)` of FlashAttention, `window_left=w` of FlashInfer.

    Args:
        size: keys in the window, at least 1.

    Raises:
        ValueError: for a size below 1, or no int.

    Source: Beltagy, Peters and Cohan, 2020 (Longformer), section 3.1; causal as in Jiang et al., 2023 (Mistral 7B).

    Example:
        >>> import flexattn
        >>> flexattn.create_mask(flexattn.masks.sliding_window(2), None, None, 3, 3)[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    size: int

    def __post_init__(self) -> None:
        check_size("size", self.size, 1, "0 attends to nothing: the size counts the query's own position")

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

    The `window_size=(left, right)` of FlashAttention, and of `LocalMask` in JAX Splash: left + 1 + right keys. Where
    FlashAttention writes -1 for a side without limit, write None. It also aligns unequal lengths at the bottom right,
    this at the top left.

    Args:
        left: keys before the query, 0 or more; None for all of them.
        right: keys after it, the same. `window(None, 0)` is causal.

    Raises:
        ValueError: for a negative side, or one that is no int.

    Example:
        >>> import flexattn
        >>> flexattn.create_mask(flexattn.masks.window(1, 1), None, None, 3, 4)[0, 0].int().tolist()
        [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]
        >>> flexattn.create_mask(flexattn.masks.window(None, 1), None, None, 3, 4)[0, 0].int().tolist()
        [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    """

    left: int | None
    right: int | None

    def __post_init__(self) -> None:
        for name, side in (("left", self.left), ("right", self.right)):
            _check_side(name, side)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        distance = q_idx - kv_idx
        if self.left is None and self.right is None:
            return b.new_ones((), dtype=torch.bool)
        if self.left is None:
            return distance >= -self.right  # type: ignore[operator]
        if self.right is None:
            return distance <= self.left
        return (distance <= self.left) & (distance >= -self.right)


def _check_side(name: str, side: Any) -> None:
    if side is not None and (not is_integer(side) or side < 0):
        raise ValueError(
            f"{name} must be an int, 0 or more, or None for no limit (FlashAttention's -1); got {described(side)}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class dilated(MaskObject):
    """Causal, `size` keys that lie `dilation` apart: `q_idx - kv_idx` is one of 0, dilation, ..., (size - 1) * dilation.

    With size 2 and dilation 2:

        1 . . . .
        . 1 . . .
        1 . 1 . .
        . 1 . 1 .
        . . 1 . 1

    The size counts the query itself, as in `sliding_window`, which is dilation 1. Neighbours share no keys: a layer of
    its own, or an `or_masks` with a window, joins them. A block of keys is skipped only beyond the whole reach, so this
    saves less than a window of as many keys.

    Args:
        size: keys of a query, at least 1.
        dilation: distance from one to the next, at least 1.

    Raises:
        ValueError: for numbers below 1, or no ints.

    Source: Beltagy, Peters and Cohan, 2020 (Longformer), section 3.1; its windows look to both sides.

    Example:
        >>> import flexattn
        >>> flexattn.create_mask(flexattn.masks.dilated(2, 2), None, None, 4, 4)[0, 0].int().tolist()
        [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
    """

    size: int
    dilation: int

    def __post_init__(self) -> None:
        check_size("size", self.size, 1, "It counts the query's own position")
        check_size("dilation", self.dilation, 1, "1 is a window without gaps")

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        distance = q_idx - kv_idx
        return (distance >= 0) & (distance < self.size * self.dilation) & (distance % self.dilation == 0)


@dataclass(frozen=True, eq=False, repr=False)
class streaming(MaskObject):
    """Causal, the first `sinks` keys and the last `size`: `q_idx >= kv_idx and (kv_idx < sinks or q_idx - kv_idx < size)`.

    With 1 sink and size 2:

        1 . . . .
        1 1 . . .
        1 1 1 . .
        1 . 1 1 .
        1 . . 1 1

    The size counts the query itself, as in `sliding_window`, so a query sees up to sinks + size keys: the paper's cache
    of `start_size` and `recent_size` entries once the query's own key is in it. The paper counts positions within the
    cache; positional encodings are yours to apply.

    Args:
        sinks: keys at the start that stay visible, 0 or more; the paper takes 4.
        size: keys in the window, at least 1.

    Raises:
        ValueError: for numbers below that, or no ints.

    Source: Xiao et al., 2024 (StreamingLLM), section 3.2.

    Example:
        >>> import flexattn
        >>> flexattn.create_mask(flexattn.masks.streaming(1, 2), None, None, 4, 4)[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    """

    sinks: int
    size: int

    def __post_init__(self) -> None:
        check_size("sinks", self.sinks, 0, "0 is sliding_window(size)")
        check_size("size", self.size, 1, "It counts the query's own position")

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        return (q_idx >= kv_idx) & ((kv_idx < self.sinks) | (q_idx - kv_idx < self.size))


@dataclass(frozen=True, eq=False, repr=False)
class chunked(MaskObject):
    """Within chunks of `size` positions: `q_idx // size == kv_idx // size`. Not causal by itself.

    With size 2:

        1 1 . .
        1 1 . .
        . . 1 1

    Llama 4 combines it with `causal_mask`. Chunks start at position 0; Hugging Face's `chunked_overlay` starts them after
    the left padding of each sequence, torchtitan's `get_fixed_block_mask_mod` as here.

    Args:
        size: positions of a chunk, at least 1.

    Raises:
        ValueError: for a size below 1, or no int.

    Example:
        >>> import flexattn
        >>> flexattn.create_mask(flexattn.masks.chunked(2), None, None, 3, 3)[0, 0].int().tolist()
        [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """

    size: int

    def __post_init__(self) -> None:
        check_size("size", self.size, 1, "A chunk has at least one position")

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        return q_idx // self.size == kv_idx // self.size
