"""A mask_mod with parameters: how it is named, and how its tensors move to another device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

MaskMod = Callable[..., Tensor]


class MaskObject:
    """What the masks of this package have in common; each is a frozen dataclass of its parameters."""

    def __repr__(self) -> str:
        # A parameter that was left out is left out: one whose default and value are None.
        named = [(f, getattr(self, f.name)) for f in fields(self)]  # type: ignore[arg-type]
        shown = (f"{f.name}={_shown(value)}" for f, value in named if value is not None or f.default is not None)
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def __name__(self) -> str:
        return repr(self)

    def to(self, device: torch.device | str) -> Any:
        """The same mask with its tensors on another device."""
        return replace(self, **{f.name: moved(getattr(self, f.name), device) for f in fields(self)})  # type: ignore[type-var,arg-type]


def moved(value: Any, device: torch.device | str) -> Any:
    """A tensor, or a mask of this package with its tensors, on another device; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(moved(v, device) for v in value)
    return value.to(device) if isinstance(value, (Tensor, MaskObject)) else value


def name_of(mask: Any) -> str:
    """What a mask or a mod is called in a title, and in the name of another one."""
    if isinstance(mask, functools.partial):
        return f"partial({name_of(mask.func)})"
    shown = repr(mask)  # that of Python's own has an address
    plain = type(mask).__name__ if shown == object.__repr__(mask) else shown
    return str(getattr(mask, "__name__", plain))


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor{list(value.shape)}"
    return name_of(value) if callable(value) else repr(value)
