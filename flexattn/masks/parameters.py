"""The parameters of a mask: what is refused, with a message that says what to write, and how a number a batch is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def described(value: Any) -> str:
    """A parameter as an error message shows it: a tensor by its dtype and shape."""
    return f"a {value.dtype} tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def is_integer(value: Any) -> bool:
    """An int, also of a dynamic shape, that is no bool."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def holds_integers(t: Tensor) -> bool:
    """A tensor of positions, ids or counts."""
    return not (t.is_floating_point() or t.is_complex() or t.dtype is torch.bool)


def check_integers(what: str, value: Any, dims: tuple[int, ...], expected: str) -> None:
    """Raise unless `value` is an integer tensor of so many dimensions, or an int where none are among them."""
    if isinstance(value, Tensor):
        fits = value.dim() in dims and holds_integers(value)
    else:
        fits = 0 in dims and is_integer(value)
    if not fits:
        raise ValueError(f"{what} must be {expected}; got {described(value)}")


def check_size(what: str, value: Any, least: int, why: str) -> None:
    """Raise unless `value` is an int of at least `least`; `why` ends the message."""
    if not is_integer(value) or value < least:
        raise ValueError(f"{what} must be an int, {least} or more; got {described(value)}. {why}")


def check_ids(what: str, value: Any) -> None:
    """Raise unless `value` holds an integer for each position: [S] or [B, S]."""
    if isinstance(value, Tensor) and value.dtype is torch.bool:
        raise ValueError(f"{what} is {described(value)}; it must hold integers: write {what}.to(torch.int32)")
    if not isinstance(value, Tensor) or value.dim() not in (1, 2) or not holds_integers(value):
        if isinstance(value, (list, tuple)):
            few = f"{value!r:.40}" + ("..." if len(repr(value)) > 40 else "")
            raise ValueError(f"{what} must be an integer tensor [S] or [B, S]; got {few}: write torch.tensor({what})")
        raise ValueError(
            f"{what} must be an integer tensor [S] or [B, S], an id for each position; got {described(value)}"
        )


def check_same_dims(what: str, value: Tensor, other: str, reference: Tensor) -> None:
    """Raise unless both have a batch, of one size, or neither."""
    if value.dim() != reference.dim() or value.shape[:-1] != reference.shape[:-1]:
        raise ValueError(
            f"{what} is {described(value)} and {other} {described(reference)}; give both with the same batch, [B, S], "
            f"or both without, [S]: for instance {what}.expand(B, -1)"
        )


def per_batch(value: Any, b: Tensor) -> Any:
    """The number of this batch entry; an int and a 0-d tensor are the same for all."""
    return value[b] if isinstance(value, Tensor) and value.dim() == 1 else value


def at(ids: Tensor, b: Tensor, position: Tensor) -> Tensor:
    """The id at a position, of [S] or [B, S]."""
    return ids[position] if ids.dim() == 1 else ids[b, position]
