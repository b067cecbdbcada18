"""The lowest and highest value that something takes in each of many boxes of indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .evaluate import TORCH_DTYPE
from .ir import DType


class Bounds(NamedTuple):
    """The lowest and highest value, and for floats whether it may be nan (None: never)."""

    lo: Tensor
    hi: Tensor
    nan: Tensor | None = None

    @property
    def is_point(self) -> bool:
        return self.lo is self.hi


def limits(dtype: DType) -> tuple[int, int]:
    """The lowest and highest value of an integer dtype."""
    info = torch.iinfo(TORCH_DTYPE[dtype])
    return info.min, info.max


def everything(dtype: DType, device: torch.device) -> Bounds:
    if dtype is DType.BOOL:
        return Bounds(torch.tensor(False, device=device), torch.tensor(True, device=device))
    if dtype.is_int:
        low, high = limits(dtype)
        return Bounds(torch.tensor(low, device=device), torch.tensor(high, device=device))
    inf = torch.tensor(torch.inf, dtype=TORCH_DTYPE[dtype], device=device)
    return Bounds(-inf, inf, torch.tensor(True, device=device))


def corners(f: Callable[[Tensor, Tensor], Tensor], a: Bounds, b: Bounds) -> Bounds:
    """For a function that is monotone in each operand."""
    if b.is_point:
        one, two = f(a.lo, b.lo), f(a.hi, b.lo)
        return Bounds(torch.minimum(one, two), torch.maximum(one, two))
    if a.is_point:
        one, two = f(a.lo, b.lo), f(a.lo, b.hi)
        return Bounds(torch.minimum(one, two), torch.maximum(one, two))
    one, two, three, four = f(a.lo, b.lo), f(a.lo, b.hi), f(a.hi, b.lo), f(a.hi, b.hi)
    return Bounds(
        torch.minimum(torch.minimum(one, two), torch.minimum(three, four)),
        torch.maximum(torch.maximum(one, two), torch.maximum(three, four)),
    )


def square(a: Bounds) -> Bounds:
    low = absolute(a)
    return Bounds(low.lo * low.lo, low.hi * low.hi)


def absolute(a: Bounds) -> Bounds:
    return Bounds(torch.maximum(a.lo, -a.hi).clamp_min(0), torch.maximum(-a.lo, a.hi))


def float_bounds(lo: Tensor, hi: Tensor, nan: Tensor | None = None) -> Bounds:
    """Bounds with whatever is nan among them made infinite."""
    unknown = lo.isnan() | hi.isnan()
    nan = unknown if nan is None else nan | unknown
    return Bounds(lo.where(~unknown, -torch.inf), hi.where(~unknown, torch.inf), nan)


def either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a | b


def may_be_nan(a: Bounds) -> Tensor:
    return torch.tensor(False, device=a.lo.device) if a.nan is None else a.nan
