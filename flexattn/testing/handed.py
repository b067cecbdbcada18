"""What an attention under test is handed: copies, which it may write to. And what it returned, in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def handed(leaf: Tensor) -> Tensor:
    """A copy of `leaf` with its strides and its gradient.

    Like the result of a projection it is no leaf, so that `q *= scale` works in it as in a model; and what is written to it
    does not reach the numbers that the result is judged by.
    """
    if any(stride == 0 and n > 1 for stride, n in zip(leaf.stride(), leaf.shape, strict=True)):
        return leaf  # expanded: torch refuses to write to it
    copy = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
    return copy.copy_(leaf)


def written(names: tuple[str, ...], given: list[Tensor], leaves: list[Tensor]) -> list[str]:
    """The names of what was handed and is not what it was."""
    pairs = zip(names, given, leaves, strict=True)
    return [name for name, a, b in pairs if not torch.equal(a.detach().nan_to_num(), b.detach().nan_to_num())]


def returned(made: Any) -> str:
    """What an attention returned, in words."""
    if isinstance(made, Tensor):
        return f"a tensor of shape {tuple(made.shape)}"
    if not isinstance(made, (tuple, list)):
        return f"a {type(made).__name__}"
    parts = ", ".join(f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__ for t in made)
    return f"a {type(made).__name__} of {parts}"


def advice(made: Any, shape: tuple[int, ...]) -> str:
    """How to make an output [B, H, L, ...] of what was returned, `shape` being (B, H, L); "" where that is not plain."""
    several = isinstance(made, (tuple, list)) and len(made) > 0
    out = made[0] if several else made
    B, H, L = shape
    turned = isinstance(out, Tensor) and out.dim() == 4 and H != L and tuple(out.shape[:3]) == (B, L, H)
    if not isinstance(out, Tensor) or not (several or turned):
        return ""
    taken = "[0]" if several else ""
    return f". Wrap it: lambda q, k, v: layer(q, k, v){taken}{'.transpose(1, 2)' if turned else ''}"
