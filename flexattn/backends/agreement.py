"""Whether two runs of one call computed the same, up to rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import Product

ROWS = 1 << 16  # that are compared at once: float32 copies of more would need memory that a training step has not left
# By the kind of product, else by dtype: how far apart elements may be, as part of the largest of their row and of the
# root mean square of the tensor. Another tile rounds the weights of a row otherwise, and sums cancel; what this is to
# find is a wrong tile, whose elements have no digit right.
BY_PRODUCT: dict[Product, float] = {"tf32": 2**-6, "ieee": 2**-10}
BY_DTYPE = {torch.bfloat16: 2**-4, torch.float16: 2**-6}


def agree(found: Sequence[Tensor], expected: Sequence[Tensor], product: Product) -> bool:
    """Whether all elements that are finite in `expected` are nearly the same in `found`. Waits for the device."""
    of_dtypes = [BY_DTYPE[t.dtype] for t in expected if t.dtype in BY_DTYPE]
    tolerance = BY_PRODUCT.get(product) or max(of_dtypes, default=BY_DTYPE[torch.bfloat16])
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b.numel()]
    return all(_near(a, b, tolerance) for a, b in pairs)


def _near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    width = expected.shape[-1] if expected.dim() else 1
    rows = [t.reshape(-1, width).split(ROWS) for t in (found, expected)]
    squares = sum(_finite(b).square().sum(dtype=torch.float64) for b in rows[1])
    size = (torch.as_tensor(squares) / expected.numel()).sqrt()
    near = torch.ones((), dtype=torch.bool, device=expected.device)
    for a, b in zip(*rows, strict=True):
        largest = _finite(b).abs().amax(-1, keepdim=True)
        # A comparison with nan is false.
        near &= ((a.float() - b.float()).abs() <= tolerance * (largest + size)).logical_or(~b.isfinite()).all()
    return bool(near)


def _finite(t: Tensor) -> Tensor:
    return torch.nan_to_num(t.float(), 0.0, 0.0, 0.0)
