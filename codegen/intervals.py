"""Bounds of every value of a graph over boxes of indices: interval arithmetic, vectorised over many boxes.

In: a box for each input, as a lowest and a highest tensor. Out: the lowest and highest value that each node can take in
its box. Booleans are three-valued: `lo` says certainly true, `hi` possibly true. Bounds of what depends only on inputs
that are points (`lo is hi`) are its exact value.

Integers are bounded in int64 as if they never wrapped; nodes that can wrap (`Context.wrapping`) are given the whole
range of their dtype wherever they would. The rules of each operation are in `bounds_of_integers`, `bounds_of_floats` and
`bounds_of_booleans`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bounds import Bounds, either, everything, float_bounds, limits, may_be_nan
from .bounds_of_booleans import BOOL, COMPARE
from .bounds_of_floats import FLOAT
from .bounds_of_integers import GROWING, INTEGER
from .evaluate import TORCH_DTYPE, Inputs, evaluate
from .ir import DType, Node, Op, walk
from .range_tables import RangeTables

Box = Mapping[str, Bounds]
_NEAR = 1 << 62


@dataclass
class Context:
    """What bounds are computed from besides a box: captured tensors, run-time numbers, and their range tables."""

    inputs: Inputs
    tables: RangeTables
    wrapping: frozenset[Node] = field(default_factory=frozenset)

    @classmethod
    def of(cls, roots: Sequence[Node], inputs: Inputs, whole: Box, memory: int) -> Context:
        """The context of `roots`; `whole` is a box that contains all others, of which integers that may wrap are told.

        `memory`: bytes that range tables may take.
        """
        context = cls(inputs, RangeTables(memory))
        wrapping: set[Node] = set()
        _walk(roots, whole, context, wrapping)
        context.wrapping = frozenset(wrapping)
        return context


def bounds(roots: Sequence[Node], box: Box, context: Context) -> list[Bounds]:
    """The bounds of `roots` over boxes. A tensor of a box holds one number for each of N boxes."""
    return _walk(roots, box, context, None)


def _walk(roots: Sequence[Node], box: Box, context: Context, wrapping: set[Node] | None) -> list[Bounds]:
    points = frozenset(name for name, b in box.items() if b.is_point)
    exact = context.inputs.fork({name: box[name].lo for name in points})
    known: dict[Node, Bounds] = {}
    for node in walk(*roots):
        if node.op is Op.CAPTURED:
            continue
        if node.op is Op.INPUT:
            known[node] = box[str(node.value)]
        elif node.axes <= points and (wrapping is None or node.op not in GROWING):
            (value,) = evaluate([node], exact)
            known[node] = _point(value, node.dtype)
        else:
            known[node] = _bound(node, [known[a] for a in node.args if a.op is not Op.CAPTURED], context, wrapping)
    return [known[r] for r in roots]


def _point(value: Tensor, dtype: DType) -> Bounds:
    value = value.long() if dtype.is_int else value
    return float_bounds(value, value) if dtype.is_float else Bounds(value, value)


def _bound(node: Node, args: list[Bounds], context: Context, wrapping: set[Node] | None) -> Bounds:
    if node.op is Op.LOAD:
        base = node.args[0]
        assert isinstance(base.value, tuple)
        found = context.tables.load(context.inputs.captured[base.value[0]], [(a.lo, a.hi) for a in args])
        if found is None:
            return everything(node.dtype, args[0].lo.device)
        if node.dtype.is_float:
            return float_bounds(*found)
        return Bounds(*(t.long() for t in found)) if node.dtype.is_int else Bounds(*found)
    if node.op is Op.CAST:
        return _cast(args[0], node.args[0].dtype, node.dtype)
    if node.op is Op.WHERE:
        return _where(*args)
    if node.op is Op.DETACH:
        return args[0]
    operand = node.args[0].dtype
    if operand.is_float:
        return FLOAT[node.op](node, *args)
    if operand is DType.BOOL:
        return BOOL[node.op](*args)
    if node.dtype is DType.BOOL:
        return COMPARE[node.op](*args)
    return _integer(node, args, context, wrapping)


def _integer(node: Node, args: list[Bounds], context: Context, wrapping: set[Node] | None) -> Bounds:
    rule, (low, high) = INTEGER[node.op], limits(node.dtype)
    if wrapping is not None:
        if _may_wrap(node, args):
            wrapping.add(node)
            return everything(node.dtype, args[0].lo.device)
    elif node in context.wrapping:
        if node.dtype is DType.INT64:
            return everything(node.dtype, args[0].lo.device)
        found, wide = rule(node, *args), _wide(node, args)
        fits = (wide.lo >= low) & (wide.hi <= high)
        return Bounds(torch.where(fits, found.lo, low), torch.where(fits, found.hi, high))
    return rule(node, *args)


def _wide(node: Node, args: list[Bounds]) -> Bounds:
    """Bounds in float64, which do not wrap themselves."""
    wide: Bounds = INTEGER[node.op](node, *(Bounds(a.lo.double(), a.hi.double()) for a in args))
    return wide


def _may_wrap(node: Node, args: list[Bounds]) -> bool:
    if node.op in (Op.MOD, Op.FMOD):  # whose rules negate
        return any(bool((a.lo < -_NEAR).any()) for a in args)
    if node.op not in GROWING:
        return False
    low, high = limits(node.dtype)
    wide = _wide(node, args)
    if node.dtype is DType.INT64:  # near its limits float64 does not tell
        return bool(((wide.lo < -_NEAR) | (wide.hi > _NEAR)).any())
    if node.op in (Op.POW, Op.SHL):  # whose rules give the limits where they know nothing, of which a part may wrap
        return bool(((wide.lo <= low) | (wide.hi >= high)).any())
    return bool(((wide.lo < low) | (wide.hi > high)).any())


def _where(condition: Bounds, a: Bounds, b: Bounds) -> Bounds:
    # Where the condition is certain both are the same branch, else one is each of them.
    some, all_ = condition.hi, condition.lo
    low = _lowest(torch.where(some, a.lo, b.lo), torch.where(all_, a.lo, b.lo))
    high = _highest(torch.where(some, a.hi, b.hi), torch.where(all_, a.hi, b.hi))
    return Bounds(low, high, either(a.nan, b.nan))


def _lowest(a: Tensor, b: Tensor) -> Tensor:
    return a & b if a.dtype is torch.bool else torch.minimum(a, b)


def _highest(a: Tensor, b: Tensor) -> Tensor:
    return a | b if a.dtype is torch.bool else torch.maximum(a, b)


def _cast(a: Bounds, source: DType, target: DType) -> Bounds:
    if target is DType.BOOL:
        if source is DType.BOOL:
            return a
        return Bounds((a.lo > 0) | (a.hi < 0), ((a.lo != 0) | (a.hi != 0)) | may_be_nan(a))
    if target.is_float:
        dtype = TORCH_DTYPE[target]
        return float_bounds(a.lo.to(dtype), a.hi.to(dtype), a.nan)
    low, high = limits(target)
    if not source.is_float:
        lo, hi = a.lo.long(), a.hi.long()
        fits = (lo >= low) & (hi <= high)
        return Bounds(torch.where(fits, lo, low), torch.where(fits, hi, high))
    # Beyond 2^62 the comparison with the limits of int64 would itself be rounded.
    lo, hi = a.lo.double(), a.hi.double()
    fits = (lo >= max(low, -(1 << 62))) & (hi <= min(high, 1 << 62)) & ~may_be_nan(a)
    return Bounds(
        torch.where(fits, lo.where(fits, 0).trunc().long(), low),
        torch.where(fits, hi.where(fits, 0).trunc().long(), high),
    )
