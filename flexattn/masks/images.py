"""The masks of images: a grid of pixels on its own, and images among the tokens of a text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..mask_object import MaskObject
from .parameters import at, check_ids, check_size, described, is_integer


@dataclass(frozen=True, eq=False, repr=False)
class natten_2d(MaskObject):
    """Neighbourhood attention: each pixel sees a rectangle of `kernel` pixels around it, shifted inwards at the borders.

    Pixel (y, x) is token y * width + x. Along each axis of `length` pixels the rectangle of a query starts at
    `first = clamp(query - kernel // 2, 0, length - kernel)` and a key is seen if `first <= key < first + kernel`; so
    every query has kernel * kernel keys, also in a corner. An image of 1 x 5 with kernel (1, 3):

        1 1 1 . .
        1 1 1 . .
        . 1 1 1 .
        . . 1 1 1
        . . 1 1 1

    NATTEN's `kernel_size` without dilation: windows are shifted, not cut off. (A window cut off at the border is
    `window(kernel // 2, kernel // 2)` in one dimension.) attention-gym's `generate_natten` takes the width first; for
    square images and kernels it is the same.

    Args:
        height, width: of the image, in tokens; Q_LEN = KV_LEN = height * width.
        kernel: an odd int, or (rows, columns), both odd and not larger than the image.

    Raises:
        ValueError: for sizes below 1, an even kernel, and one larger than the image.

    Source: Hassani et al., 2023 (Neighborhood Attention Transformer), section 3.1.

    Example:
        >>> import flexattn
        >>> mask = flexattn.create_mask(flexattn.masks.natten_2d(4, 4, 3), None, None, 16, 16)[0, 0]
        >>> mask[0].view(4, 4).int().tolist()  # what the pixel in the corner sees
        [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    """

    height: int
    width: int
    kernel: int | tuple[int, int]

    def __post_init__(self) -> None:
        check_size("height", self.height, 1, "It counts rows of tokens")
        check_size("width", self.width, 1, "It counts columns of tokens")
        kernel = self.kernel if isinstance(self.kernel, tuple) else (self.kernel, self.kernel)
        if len(kernel) != 2 or not all(is_integer(k) and k >= 1 and k % 2 == 1 for k in kernel):
            raise ValueError(
                f"kernel must be an odd int, or two, (rows, columns); got {described(self.kernel)}. An even one has no "
                "middle"
            )
        for k, length, axis in ((kernel[0], self.height, "height"), (kernel[1], self.width, "width")):
            if k > length:
                raise ValueError(
                    f"a kernel of {k} does not fit into the {axis}, {length}; the largest that does is "
                    f"{length - 1 + length % 2}"
                )

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        rows, columns = self.kernel if isinstance(self.kernel, tuple) else (self.kernel, self.kernel)
        in_rows = _near(q_idx // self.width, kv_idx // self.width, rows, self.height)
        return in_rows & _near(q_idx % self.width, kv_idx % self.width, columns, self.width)


def _near(query: Tensor, key: Tensor, kernel: int, length: int) -> Tensor:
    first = (query - kernel // 2).clamp(0, length - kernel)
    return (key >= first) & (key < first + kernel)


@dataclass(frozen=True, eq=False, repr=False)
class transfusion(MaskObject):
    """Causal text with images that see all of themselves: `q_idx >= kv_idx or spans[q_idx] == spans[kv_idx] >= 0`.

    With spans -1 0 0 -1, a text token, an image of two and another text token:

        1 . . .
        1 1 1 .
        1 1 1 .
        1 1 1 1

    What comes after an image sees it, and an image sees what comes before it. Gemma 3 does the same in its layers of
    global attention; PaliGemma lets the image and the whole question see each other, which is `prefix_lm`.
    In Chameleon images are causal as well: `causal_mask`.

    Args:
        spans: integers [S] or [B, S]: negative for text, else the number of the image. Numbers must differ between
            images of a sequence. In a packed one, and it with `document_mask`.

    Raises:
        ValueError: for ids that are no integers, or of another shape.

    Source: Zhou et al., 2024 (Transfusion), section 3.

    Example:
        >>> import torch, flexattn
        >>> mask = flexattn.masks.transfusion(torch.tensor([-1, 0, 0, -1]))
        >>> flexattn.create_mask(mask, None, None, 4, 4)[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    """

    spans: Tensor

    def __post_init__(self) -> None:
        check_ids("spans", self.spans)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        span = at(self.spans, b, q_idx)
        return (q_idx >= kv_idx) | ((span == at(self.spans, b, kv_idx)) & (span >= 0))
