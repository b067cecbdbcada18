"""What an IR graph means, in torch: the judge of every pass and every backend, and the evaluator of the tiled backend.

In: nodes, and tensors for the inputs, broadcastable against each other. Out: one tensor a node, of the smallest shape
that the inputs it depends on need (`slopes[h]` stays `[H, 1, 1]` however large the tile is).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from .ir import INDEX_INPUTS, DType, Node, Op, walk

TORCH_DTYPE: dict[DType, torch.dtype] = {d: getattr(torch, d.value) for d in DType}
IR_DTYPE: dict[torch.dtype, DType] = {t: d for d, t in TORCH_DTYPE.items()}

Evaluator = Callable[..., Tensor]

EVALUATE: dict[Op, Evaluator] = {
    Op.ADD: torch.add,
    Op.SUB: torch.sub,
    Op.MUL: torch.mul,
    Op.DIV: torch.true_divide,
    Op.FLOORDIV: torch.floor_divide,
    Op.TRUNCDIV: lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    Op.MOD: torch.remainder,
    Op.FMOD: torch.fmod,
    Op.POW: torch.pow,
    Op.MAXIMUM: torch.maximum,
    Op.MINIMUM: torch.minimum,
    Op.NEG: torch.neg,
    Op.ABS: torch.abs,
    Op.SIGN: torch.sign,
    Op.AND: torch.bitwise_and,
    Op.OR: torch.bitwise_or,
    Op.XOR: torch.bitwise_xor,
    Op.NOT: torch.bitwise_not,
    Op.SHL: torch.bitwise_left_shift,
    Op.SHR: torch.bitwise_right_shift,
    Op.LT: torch.lt,
    Op.LE: torch.le,
    Op.EQ: torch.eq,
    Op.NE: torch.ne,
    Op.WHERE: torch.where,
    Op.DETACH: torch.Tensor.detach,
    Op.EXP: torch.exp,
    Op.EXP2: torch.exp2,
    Op.EXPM1: torch.expm1,
    Op.LOG: torch.log,
    Op.LOG2: torch.log2,
    Op.LOG1P: torch.log1p,
    Op.SQRT: torch.sqrt,
    Op.RSQRT: torch.rsqrt,
    Op.SIN: torch.sin,
    Op.COS: torch.cos,
    Op.ATAN: torch.atan,
    Op.TANH: torch.tanh,
    Op.SIGMOID: torch.sigmoid,
    Op.ERF: torch.erf,
    Op.FLOOR: torch.floor,
    Op.CEIL: torch.ceil,
    Op.ROUND: torch.round,
    Op.TRUNC: torch.trunc,
}


@dataclass
class Inputs:
    """The tensors an evaluation reads.

    `named` maps `score`, `b`, `h`, `q_idx`, `kv_idx`, `grad` to tensors; `captured` holds c0, c1, ... followed by the
    run-time floats; `ints` the run-time integers. `on_load` sees each loaded value, for instance to hook
    its gradient. Results in `memo` are reused, which is how values that no tile changes are computed once. `wrapped` holds
    indices as `wrap_index` gives them for a size, where they are known.
    """

    named: Mapping[str, Tensor]
    captured: Sequence[Tensor] = ()
    floats: Sequence[float | Tensor] = ()
    ints: Sequence[int] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    memo: dict[Node, Tensor] = field(default_factory=dict)
    on_load: Callable[[Tensor], Tensor] | None = None
    wrapped: Mapping[tuple[Node, int], Tensor] = field(default_factory=dict)

    def fork(self, named: Mapping[str, Tensor]) -> Inputs:
        """The same inputs with some tensors replaced; what depends on none of the replaced ones is kept."""
        changed = frozenset(named)
        kept = {n: t for n, t in self.memo.items() if not n.axes & changed}
        wrapped = {key: t for key, t in self.wrapped.items() if not key[0].axes & changed}
        return Inputs(
            {**self.named, **named}, self.captured, self.floats, self.ints, self.device, kept, self.on_load, wrapped
        )


class Pool:
    """Memory for tile-sized values, reused: a fresh allocation of that size costs more than the arithmetic on it."""

    SMALLEST = 1 << 14  # elements; below, the allocator's own free lists are as good

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[Tensor] = []
        self._taken: dict[int, tuple[Tensor, Tensor]] = {}  # holds the tensor itself, so that its id stays its own

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        size = math.prod(shape) * dtype.itemsize
        fitting = [i for i, t in enumerate(self._free) if t.numel() >= size]
        if fitting:
            raw = self._free.pop(min(fitting, key=lambda i: self._free[i].numel()))
        else:
            raw = torch.empty(size, dtype=torch.uint8, device=self.device)
        made = raw[:size].view(dtype).view(tuple(shape))
        self._taken[id(made)] = (made, raw)
        return made

    def give(self, tensor: Tensor) -> None:
        """Take back a tensor that `take` gave; any other is ignored."""
        taken = self._taken.pop(id(tensor), None)
        if taken is not None:
            self._free.append(taken[1])


@lru_cache(maxsize=1024)
def _order(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    return tuple(n for n in walk(*nodes) if n.op is not Op.CAPTURED)


def steady(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The nodes below `nodes` that depend on indices alone, on no tensor and no run-time number."""
    found: dict[Node, None] = {}
    for node in _order(tuple(nodes)):
        if node.op is Op.INPUT:
            constant = node.value in INDEX_INPUTS
        else:
            constant = node.op not in (Op.LOAD, Op.FLOAT, Op.INT) and all(a in found for a in node.args)
        if constant:
            found[node] = None
    return tuple(found)


def evaluate(nodes: Sequence[Node], inputs: Inputs, pool: Pool | None = None) -> list[Tensor]:
    """The values of `nodes`. Negative indices of captured tensors wrap; indices beyond the tensor read its border.

    With a `pool`, large results live in it: the caller gives them back, and intermediate ones return by themselves.
    """
    memo = inputs.memo
    todo = [n for n in _order(tuple(nodes)) if n not in memo]
    if pool is None:
        for node in todo:
            memo[node] = _value(node, inputs)
        return [memo[n] for n in nodes]
    last_use = {a: i for i, node in enumerate(todo) for a in node.args}
    made: set[Node] = set()
    for i, node in enumerate(todo):
        memo[node] = _value_in(node, inputs, pool, made)
        for arg in node.args:
            if last_use[arg] == i and arg in made and arg not in nodes:
                pool.give(memo.pop(arg))
                made.discard(arg)
    results = [memo[n] for n in nodes]
    for node in made:
        memo.pop(node, None)
    return results


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The common shape of operands that broadcast; `torch.broadcast_shapes` takes twenty times as long."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*padded, strict=True))


def _value_in(node: Node, inputs: Inputs, pool: Pool, made: set[Node]) -> Tensor:
    """One value, in the pool if it is large and its operation can write to a given tensor."""
    args = [inputs.memo[a] for a in node.args] if node.op in EVALUATE or node.op is Op.CAST else []
    if not args or node.op is Op.TRUNCDIV:
        return _value(node, inputs)
    shape = args[0].shape if len(args) == 1 else broadcast(*(a.shape for a in args))
    if math.prod(shape) < Pool.SMALLEST:
        return _value(node, inputs)
    out = pool.take(shape, TORCH_DTYPE[node.dtype])
    made.add(node)
    # A copy even where the operand would do: its memory may be given back before that of the result.
    return out.copy_(args[0]) if node.op in (Op.CAST, Op.DETACH) else EVALUATE[node.op](*args, out=out)


def _value(node: Node, inputs: Inputs) -> Tensor:
    memo, op = inputs.memo, node.op
    if op in EVALUATE:
        return EVALUATE[op](*[memo[a] for a in node.args])
    dtype = TORCH_DTYPE[node.dtype]
    match op:
        case Op.INPUT:
            return inputs.named[str(node.value)].to(dtype)
        case Op.CONST:
            return torch.full((), node.value, dtype=dtype, device=inputs.device)  # type: ignore[arg-type]
        case Op.FLOAT:
            number = inputs.floats[operator.index(node.value)]  # type: ignore[arg-type]
            if isinstance(number, Tensor):
                return number.to(inputs.device, dtype)
            return torch.full((), number, dtype=dtype, device=inputs.device)
        case Op.INT:
            return torch.full((), inputs.ints[operator.index(node.value)], dtype=dtype, device=inputs.device)  # type: ignore[arg-type]
        case Op.CAST:
            return memo[node.args[0]].to(dtype)
        case Op.LOAD:
            base, *index = node.args
            assert isinstance(base.value, tuple)
            tensor = inputs.captured[base.value[0]]
            if not index:  # a 0-d tensor may be anywhere, as in torch
                tensor = tensor.to(inputs.device)
            known = [inputs.wrapped.get((i, n)) for i, n in zip(index, tensor.shape, strict=True)]
            if len(known) == 1 and known[0] is not None and tensor.numel() and inputs.on_load is None:
                return tensor.take(known[0])
            return _load(tensor, [memo[i] for i in index], inputs.on_load)
    raise AssertionError(f"no meaning for {op}")


def _load(tensor: Tensor, index: list[Tensor], on_load: Callable[[Tensor], Tensor] | None) -> Tensor:
    if index:
        wrapped = [wrap_index(i, n) for i, n in zip(index, tensor.shape, strict=True)]
        # A gather from an empty tensor has no element to give: zero, as for every value that does not exist.
        if 0 in tensor.shape:
            shape = torch.broadcast_shapes(*(i.shape for i in wrapped))
            tensor = tensor.sum().expand(shape) if tensor.dtype.is_floating_point else tensor.new_zeros(shape)
        elif tensor.requires_grad and tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()[tuple(wrapped)].to(tensor.dtype)  # whose gradient is summed in float32
        else:
            tensor = tensor[tuple(wrapped)]
    return tensor if on_load is None else on_load(tensor)


def wrap_index(index: Tensor, size: int) -> Tensor:
    """`index` as torch reads it, with -1 the last element; out of range, the nearest element that exists."""
    index = index.long()
    return index.add(size, alpha=1).where(index < 0, index).clamp_(0, max(size - 1, 0))
