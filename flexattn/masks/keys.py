"""The masks of chosen keys, which are seen wherever the query stands: a prefix, the real tokens, the global ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..mask_object import MaskObject
from .parameters import at, check_integers, described, is_integer, per_batch


@dataclass(frozen=True, eq=False, repr=False)
class prefix_lm(MaskObject):
    """A prefix that all attend to, causal after it: `kv_idx < prefix_length or q_idx >= kv_idx`.

    With a prefix of 2:

        1 1 . .
        1 1 . .
        1 1 1 .
        1 1 1 1

    `generate_prefix_lm_mask(n)` of PyTorch's attention-gym counts the same way. For a prefix in each document of a
    packed sequence see `Documents.mask(..., local=True)`.

    Args:
        prefix_length: an int, a 0-d tensor, or one for each batch entry, [B].

    Raises:
        ValueError: for a length that is no integer, or has more dimensions.

    Source: Raffel et al., 2020 (T5), section 3.2.

    Example:
        >>> import flexattn
        >>> flexattn.create_mask(flexattn.masks.prefix_lm(2), None, None, 3, 3)[0, 0].int().tolist()
        [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """

    prefix_length: int | Tensor

    def __post_init__(self) -> None:
        check_integers("prefix_length", self.prefix_length, (0, 1), "an int, or an integer tensor: 0-d, or [B]")

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        return (kv_idx < per_batch(self.prefix_length, b)) | (q_idx >= kv_idx)


@dataclass(frozen=True, eq=False, repr=False)
class padding(MaskObject):
    """Only real keys of a padded batch: `kv_idx < lengths[b]`. Rows of padded queries still attend to the real keys.

    With length 2:

        1 1 . .
        1 1 . .
        1 1 . .

    Sequences start at 0 and are padded on the right. For padding on the left, real keys are those at
    `kv_idx >= KV_LEN - lengths[b]`: `not_mask(padding(KV_LEN - lengths))`, and-ed with `causal_mask` as usual.

    Args:
        lengths: integers [B], the number of real keys of each batch entry; build its block mask with this B.

    Raises:
        ValueError: for anything but an integer tensor [B].

    Example:
        >>> import torch, flexattn
        >>> flexattn.create_mask(flexattn.masks.padding(torch.tensor([1, 2])), 2, None, 1, 3)[:, 0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0]]
    """

    lengths: Tensor

    def __post_init__(self) -> None:
        check_integers("lengths", self.lengths, (1,), "an integer tensor [B]")

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        return kv_idx < per_batch(self.lengths, b)


@dataclass(frozen=True, eq=False, repr=False)
class global_tokens(MaskObject):
    """Tokens that see all and are seen by all: `q_idx < n or kv_idx < n`, or `tokens[q_idx] or tokens[kv_idx]`.

    Nothing else is attended: combine it by `or_masks` with a window. With 1 global token, alone and with `window(1, 1)`:

        1 1 1 1        1 1 1 1
        1 . . .        1 1 1 .
        1 . . .        1 1 1 1
        1 . . .        1 . 1 1

    Not causal by itself. Hugging Face's `global_attention_mask` of Longformer is `tokens`, as bools; Longformer also
    projects global tokens with weights of their own, which no mask can tell.

    Args:
        tokens: how many tokens at the start are global, an int; or which ones, bools [S] or [B, S]. Queries and keys are
            the same sequence.

    Raises:
        ValueError: for a negative number, and for a tensor that does not hold bools.

    Source: Beltagy, Peters and Cohan, 2020 (Longformer), section 3.1.

    Example:
        >>> import torch, flexattn
        >>> flexattn.create_mask(flexattn.masks.global_tokens(1), None, None, 3, 3)[0, 0].int().tolist()
        [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
        >>> last = torch.tensor([False, False, True])
        >>> flexattn.create_mask(flexattn.masks.global_tokens(last), None, None, 3, 3)[0, 0].int().tolist()
        [[0, 0, 1], [0, 0, 1], [1, 1, 1]]
    """

    tokens: int | Tensor

    def __post_init__(self) -> None:
        tokens = self.tokens
        if isinstance(tokens, Tensor):
            fits = tokens.dtype is torch.bool and tokens.dim() in (1, 2)
        else:
            fits = is_integer(tokens) and tokens >= 0
        if not fits:
            raise ValueError(
                "tokens must be a number of tokens, 0 or more, or a bool tensor [S] or [B, S] that marks them (write "
                f"mark = torch.zeros(S, dtype=torch.bool); mark[positions] = True); got {described(tokens)}"
            )

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        if isinstance(self.tokens, Tensor):
            return at(self.tokens, b, q_idx) | at(self.tokens, b, kv_idx)
        return (q_idx < self.tokens) | (kv_idx < self.tokens)
