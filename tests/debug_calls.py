"""Calls in debug mode, for the tests of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flexattn import debug_mode, flex_attention


def qkv(
    B: int = 1, H: int = 2, Hkv: int = 2, L: int = 16, S: int = 16, kv_batch: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    kv = B if kv_batch is None else kv_batch
    return torch.randn(B, H, L, 8), torch.randn(kv, Hkv, S, 8), torch.randn(kv, Hkv, S, 8)


def refused(error: type[Exception], *args: Any, **kwargs: Any) -> str:
    """What debug mode says of a call."""
    with debug_mode(), pytest.raises(error) as caught:
        flex_attention(*args, **kwargs)
    return str(caught.value)


def accepted(*args: Any, **kwargs: Any) -> Any:
    with debug_mode():
        return flex_attention(*args, **kwargs)
