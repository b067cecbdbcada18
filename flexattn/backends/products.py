"""How operands are multiplied: the width of a tile, the precision, the row of the table of configurations."""

from __future__ import annotations

from typing import NamedTuple

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


class Pieces(NamedTuple):
    """Columns of a tile: the width of the first piece, and of a second one, or 0. Powers of two."""

    width: int
    rest: int

    @property
    def columns(self) -> int:
        return self.width + self.rest


ENOUGH = 0.75  # of the padded columns: two pieces that have no more are multiplied in less time than one
NARROWEST = 64  # first piece: the products of narrower ones run below the matrix units' rate


def pieces(columns: int, allowed: bool = True) -> Pieces:
    """How many columns a tile has for a head dimension: 80 are 64 and 16, if `allowed`, rather than 128."""
    whole = padded(columns)
    first = whole // 2
    rest = padded(max(1, columns - first))
    if allowed and first >= NARROWEST and columns > first and first + rest <= ENOUGH * whole:
        return Pieces(first, rest)
    return Pieces(whole, 0)
