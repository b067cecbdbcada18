"""How operands are multiplied: the width of a tile, the precision, the row of the table of configurations."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..config import Product
from .target import interpreted


def padded(columns: int) -> int:
    """The width of a tile: a power of two that the matrix units take."""
    return max(16, 1 << (columns - 1).bit_length())


def precision_of(query: Tensor) -> str:
    """How products are computed, as `templates.product` names it. For float32, torch's own setting."""
    if interpreted() and query.dtype is torch.bfloat16:
        return "raised"
    if query.dtype is not torch.float32 or interpreted() or torch.version.hip is not None:
        return "ieee"
    if query.device.type == "cpu" and triton.runtime.driver.active.get_current_target().backend == "hip":
        return "ieee"  # only compiled, for a GPU that is named
    return "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"


def product_of(query: Tensor, precision: str) -> Product:
    """The row of the table of configurations."""
    if query.dtype is not torch.float32:
        return "half"
    return "tf32" if precision == "tf32" else "ieee"
