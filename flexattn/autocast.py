"""Autocast: the dtype that it gives to a call, and that it ends there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from .codegen.private import constant_while_compiling

_NOTHING = nullcontext()


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Inside an autocast region, attention runs in the region's dtype, as torch's does. Validated later."""
    if not isinstance(tensors[0], Tensor) or not _is_on(tensors[0].device.type):
        return tensors
    if not all(isinstance(t, Tensor) for t in tensors):
        return tensors
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype is not torch.float64 else t for t in tensors)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """For the inside of an operator, whose products have the dtype it chose."""
    return torch.autocast(device.type, enabled=False) if _is_on(device.type) else _NOTHING


def _is_on(device: str) -> bool:
    return _has_autocast(device) and torch.is_autocast_enabled(device)


@constant_while_compiling  # Dynamo of PyTorch 2.11 does not know the function
def _has_autocast(device: str) -> bool:
    return _available(device)


@cache
def _available(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
