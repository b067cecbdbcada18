"""A mask as a graph with the tensors it reads, in which equal tensors are one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..codegen.bounds import Bounds
from ..codegen.evaluate import Inputs, evaluate
from ..codegen.intervals import Context
from ..codegen.ir import INDEX_INPUTS, DType, Kind, Node, Op, const, walk
from ..codegen.pipeline import variant
from ..codegen.replay import Replay
from ..codegen.simplify import simplify
from ..codegen.spec import substitute
from ..codegen.trace import describe, trace
from ..mask_algebra import whole_mask_mod
from ..mask_object import MaskObject, name_of
from ..masks.combine import check_callable

MaskMod = Callable[..., Tensor]
Shape = tuple[int, int, int, int]
_OWN = f"{__name__.partition('.')[0]}."


@dataclass(frozen=True)
class TracedMask:
    """A graph, and what it reads."""

    node: Node
    inputs: Inputs

    @classmethod
    def of(cls, mask_mod: MaskMod, device: torch.device | None = None) -> TracedMask:
        """A mask function as a graph. `device` is where it is evaluated; by default where its tensors are.

        Raises `TraceError` for a function that cannot be traced.
        """
        program, captured, ints = trace(None, mask_mod, device=device or "cpu")
        parsed = variant(program)
        n = len(captured) - parsed.n_floats
        if device is None:
            device = next((t.device for t in captured[:n] if t.dim()), torch.device("cpu"))
        node = const(True, DType.BOOL) if parsed.mask is None else parsed.mask
        return cls(node, Inputs({}, captured[:n], captured[n:], ints, device))

    @property
    def mask_mod(self) -> MaskMod:
        """The graph as a mask function."""
        return Replay(self.node, self.inputs.captured, self.inputs.floats, self.inputs.ints)

    def merged(self) -> TracedMask:
        """The same mask, with captured tensors that hold the same, and floats that are the same, read as one."""
        rewrite: dict[Node, Node] = {}
        tensors, floats = _first_equal(self.inputs.captured), _first_equal(self.inputs.floats)
        for node in walk(self.node):
            if node.op is Op.CAPTURED and isinstance(node.value, tuple):
                number, rank = node.value
                rewrite[node] = Node(Op.CAPTURED, (), node.dtype, Kind.ELEMENT, (tensors[number], rank))
            elif node.op is Op.FLOAT and isinstance(node.value, int):
                rewrite[node] = Node(Op.FLOAT, (), node.dtype, node.kind, floats[node.value])
        (node,) = simplify(substitute([self.node], rewrite))
        return replace(self, node=node)

    def values(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Tensor:
        """The mask at indices, ints or integer tensors that broadcast; on their common shape."""
        device = self.inputs.device
        given = [torch.as_tensor(i, dtype=torch.int32, device=device) for i in (b, h, q_idx, kv_idx)]
        named = dict(zip(INDEX_INPUTS, given, strict=True))
        (found,) = evaluate([self.node], self.inputs.fork(named))
        return found.expand(torch.broadcast_shapes(*(t.shape for t in given)))

    def may_wrap(self, shape: Shape, memory: int) -> bool:
        """Whether some integer of it may overflow at indices of a shape."""
        low = torch.zeros(1, dtype=torch.int64, device=self.inputs.device)
        whole = {name: Bounds(low, low + n - 1) for name, n in zip(INDEX_INPUTS, shape, strict=True)}
        return bool(Context.of([self.node], self.inputs, whole, memory).wrapping)


def mask_function(function: str, mask: Any, shape: Shape) -> MaskMod:
    """The mask function of a mask_mod or a `BlockMask`. `function` is named where it can be neither.

    Raises:
        TypeError: for anything else.
        ValueError: for a block mask of other sizes than `shape`.
    """
    if not isinstance(mask, BlockMask):
        check_callable(function, (mask,))
        made: MaskMod = mask
        return made
    B, H, *lengths = shape
    if mask.seq_lengths != tuple(lengths):
        raise ValueError(
            f"{function}: the block mask is for lengths (Q_LEN, KV_LEN) = {mask.seq_lengths}, the shape says "
            f"{tuple(lengths)}; give the shape {mask.seq_lengths}, or build the mask for {tuple(lengths)}"
        )
    for name, size, wanted, only in zip("BH", mask.sizes, (B, H), mask.only_first, strict=True):
        if size != wanted and (size != 1 or only):
            raise ValueError(
                f"{function}: the block mask is for {name} = {size}, the shape says {wanted}; give all of "
                f"(B, H, Q_LEN, KV_LEN), with {name} = {size}, or build the mask for {wanted}"
            )
    return whole_mask_mod(mask)


def called(mask: Any) -> str:
    """What a mask is called in a report: a mask of this package as it prints, a function with file and line."""
    if isinstance(mask, BlockMask):
        return f"BlockMask of {called(mask.mask_mod)}" + ("" if mask.is_exact else ", by its lists")
    if isinstance(mask, (MaskObject, Replay)):
        return repr(mask)
    if str(getattr(mask, "__module__", None)).startswith(_OWN):
        return name_of(mask)
    return describe(mask)


def device_of(function: str, *masks: Any) -> torch.device:
    """Where masks are evaluated: where a block mask is, else where what they captured is, else on the CPU.

    `function` is named in the `TypeError` for what is no mask.
    """
    listed = [m.device for m in masks if isinstance(m, BlockMask)]
    check_callable(function, tuple(m for m in masks if not isinstance(m, BlockMask)))
    if listed:
        return listed[0]
    found = [TracedMask.of(m).inputs.device for m in masks]
    return next((d for d in found if d.type != "cpu"), torch.device("cpu"))


def _first_equal(values: Any) -> list[int]:
    """For each value the place of the first that is equal to it."""
    kept: list[int] = []
    for i, value in enumerate(values):
        kept.append(next((j for j in kept if j == kept[j] and _equal(values[j], value)), i))
    return kept


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return repr(a) == repr(b)  # which tells -0.0 from 0.0
    same = a.dtype is b.dtype and a.shape == b.shape and a.device == b.device
    return same and torch.equal(a, b) and (not a.dtype.is_floating_point or torch.equal(a.signbit(), b.signbit()))
