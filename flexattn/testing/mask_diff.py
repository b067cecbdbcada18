"""`mask_diff`: whether two masks are the same, and where they are not. In: two masks, a shape. Out: a `MaskDiff`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..codegen.tiles import DEFAULT_MEMORY
from ..mask_object import MaskObject
from .mask_picture import picture_of
from .search import search
from .sizes import mask_shape, unsaid_in
from .traced_mask import MaskMod, TracedMask, called, device_of, mask_function


class Counterexample(NamedTuple):
    """An element at which two masks differ, and whether each of them attends there."""

    b: int
    h: int
    q_idx: int
    kv_idx: int
    in_a: bool
    in_b: bool


@dataclass(frozen=True)
class MaskDiff:
    """What `mask_diff` found. `str` of it is a report for people.

    Attributes:
        equal: whether the masks agree on all elements of `shape`.
        proved: whether they are equal for every shape, by algebra, as long as no integer overflows.
        counterexample: the first element at which they differ, in the order (b, h, q_idx, kv_idx); None where they are equal.
        count: how many elements of `shape` differ.
        shape: (B, H, Q_LEN, KV_LEN).
        picture: where they differ, in characters; "" where they are equal.
        names: what the masks are called.
    """

    equal: bool
    proved: bool
    counterexample: Counterexample | None
    count: int
    shape: tuple[int, int, int, int]
    picture: str
    names: tuple[str, str]

    def __str__(self) -> str:
        heading = f"A  {self.names[0]}\nB  {self.names[1]}\n"
        of_shape = f"(B, H, Q_LEN, KV_LEN) = {self.shape}"
        at = self.counterexample
        if at is None:
            if self.proved:
                return f"{heading}equal for every shape, by algebra, as long as no integer overflows"
            return f"{heading}equal in every element of {of_shape}"
        attends, other = ("A", "B") if at.in_a else ("B", "A")
        return (
            f"{heading}differ in {self.count:,} of {math.prod(self.shape):,} elements of {of_shape}\n"
            f"first at b={at.b}, h={at.h}, q_idx={at.q_idx}, kv_idx={at.kv_idx}: {attends} attends, {other} does not\n\n"
            f"{self.picture}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        first = self.counterexample
        return {
            "equal": self.equal,
            "proved": self.proved,
            "counterexample": None if first is None else first._asdict(),
            "count": self.count,
            "shape": list(self.shape),
            "picture": self.picture,
            "names": list(self.names),
        }


@dataclass(frozen=True, eq=False, repr=False)
class _Differs(MaskObject):
    """Attended where one of two masks attends and the other does not."""

    a: MaskMod
    b: MaskMod

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.a(b, h, q_idx, kv_idx) ^ self.b(b, h, q_idx, kv_idx)


def mask_diff(
    a: MaskMod | BlockMask,
    b: MaskMod | BlockMask,
    shape: int | tuple[int, ...] | None = None,
    *,
    device: torch.device | str | None = None,
    max_memory: int = DEFAULT_MEMORY,
) -> MaskDiff:
    """Compare two masks: exactly, for a shape, and by algebra for all shapes where that succeeds.

    The masks are traced together, and the elements in which they differ are classified by blocks, as those of any mask are:
    what two long masks have in common costs next to nothing. Memory is bounded; time grows with the blocks that differ in
    part, of which every element is evaluated.

    A proof takes a captured tensor for unknown values, the same where both masks captured the same tensor, or tensors with
    the same values. It is not found for all masks that are equal: `proved=False` says nothing else.

    Args:
        a, b: functions `(b, h, q_idx, kv_idx) -> bool`, or block masks, whose lists count.
        shape: a length, (Q_LEN, KV_LEN), or (B, H, Q_LEN, KV_LEN). B and H matter for masks that depend on the batch entry
            or the head. Default: the shape of a block mask.
        device: where masks are evaluated. Default: where their tensors are.
        max_memory: bytes of work memory, besides captured tensors.

    Raises:
        TypeError: for what is no mask, and for two functions without a shape.
        ValueError: for a shape that is none, for block masks of other sizes, and for a length or a pair where the masks agree
            in b=0, h=0, and depend on the batch entry or the head.
        TraceError: for a mask that cannot be traced.
        IndexError: for a captured tensor that is shorter than the positions it is read at.

    Example:
        >>> import flexattn.testing
        >>> window = lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx <= 64)
        >>> diff = flexattn.testing.mask_diff(window, flexattn.masks.sliding_window(64), 256)
        >>> diff.count, diff.counterexample
        (192, Counterexample(b=0, h=0, q_idx=64, kv_idx=0, in_a=True, in_b=False))
        >>> flexattn.testing.mask_diff(window, flexattn.masks.sliding_window(65), 256).proved
        True
    """
    sizes = _sizes(a, b, shape)
    functions = mask_function("mask_diff", a, sizes), mask_function("mask_diff", b, sizes)
    where = device_of("mask_diff", a, b) if device is None else torch.device(device)
    traced = [TracedMask.of(f, where) for f in functions]
    listed = any(isinstance(m, BlockMask) for m in (a, b))
    found = search(_Differs(*functions), sizes, where, max_memory, {} if listed else unsaid_in(shape))
    names = called(a), called(b)
    if found.first is None:
        return MaskDiff(True, found.proved, None, 0, sizes, "", names)
    in_a, in_b = (bool(t.values(*found.first)) for t in traced)
    picture = picture_of(traced, found, sizes)
    return MaskDiff(False, False, Counterexample(*found.first, in_a, in_b), found.count, sizes, picture, names)


def _sizes(a: Any, b: Any, shape: Any) -> tuple[int, int, int, int]:
    if shape is not None:
        return mask_shape(shape)
    listed = [m for m in (a, b) if isinstance(m, BlockMask)]
    if not listed:
        raise TypeError("mask_diff of two functions needs a shape: a length, (Q_LEN, KV_LEN), or (B, H, Q_LEN, KV_LEN)")
    B, H = (max(m.sizes[axis] for m in listed) for axis in (0, 1))
    return B, H, *listed[0].seq_lengths
