"""Placeholders that record: every torch call on them becomes IR nodes instead of arithmetic.

A mod runs once with a `Placeholder` for each argument, under a `TorchFunctionMode` that sees every torch function.
A call that touches no placeholder simply runs (`self.slopes.exp()` is hoisted and stays differentiable torch); a tensor
that meets a placeholder is captured as the object it is. Indexing a captured tensor gives a *view* until every
dimension is indexed; short dimensions left over become a vector of scalars, which may be reduced.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .calls import BY_VALUE, FUNCTIONS, parameters, weak
from .errors import TraceError
from .evaluate import IR_DTYPE, TORCH_DTYPE
from .ir import DType, Kind, Node, Op, const
from .private import DisableTorchFunction, DisableTorchFunctionSubclass, base_of, make_wrapper_subclass
from .promotion import cast, current_default_float
from .refusals import own_gradient, random_number, unsupported, value_read, without_gradient, write
from .rows import PRODUCTS, REDUCTIONS, keeps_one, product, reduce, transposed
from .spec import load
from .spellings import RANDOM, RETURNS_ITSELF, SHAPE_ONLY, canonical
from .values import Value, View, known, number_of, pick

MAX_UNROLLED = 128  # elements of a captured row that may be unrolled into the kernel

_VALUE_READS = frozenset(
    ("__bool__", "item", "__int__", "__float__", "__index__", "tolist", "numpy", "__array__", "__contains__", "nonzero")
)
ATTRIBUTES = frozenset(
    ("dtype", "device", "shape", "ndim", "requires_grad", "layout", "is_cuda", "is_cpu", "is_sparse", "is_nested",
     "itemsize")
)  # fmt: skip
QUERIES = frozenset(
    ("dim", "ndimension", "size", "numel", "is_floating_point", "is_complex", "element_size", "__len__")
)
_SIGNATURE = QUERIES | {"dtype", "device", "shape", "ndim"}  # what says nothing of values


class Placeholder(Tensor):
    """Stands for a score, an index or anything computed from them, while a mod is traced."""

    content: Value | View
    recorder: Recorder
    shares: bool = False  # its memory with the value that it was detached from

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # what print() shows inside a mod
        content = self.content
        return (
            f"<traced {content.nodes[0]!r}>"
            if isinstance(content, Value)
            else f"<part of a captured tensor {content.shape}>"
        )

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __hash__(self) -> int:  # by identity it would be in no dictionary and no set, in silence
        raise value_read("__hash__")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = _find_placeholder((args, kwargs))
        assert found is not None
        return found.recorder.call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise own_gradient() if "view_as" in str(func) or "alias" in str(func) else unsupported(str(func))


def _find_placeholder(item: Any) -> Placeholder | None:
    if isinstance(item, Placeholder):
        return item
    if isinstance(item, (tuple, list)):
        return next((p for p in map(_find_placeholder, item) if p is not None), None)
    if isinstance(item, dict):
        return _find_placeholder(tuple(item.values()))
    return None


class Recorder(TorchFunctionMode):
    """Collects what a mod captures while it runs. `captured`, `floats` and `ints` are in the order of first use; `hoists`
    tells whether it did more with captured tensors than to index them and to ask for dtypes, shapes and devices."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.captured: list[Tensor] = []
        self.floats: list[float | Tensor] = []
        self.ints: list[Any] = []
        self.hoists = False
        self.requires_grad = True  # what is traced, so that what an autograd.Function returns can be told
        self._number: dict[int, int] = {}
        self._own: dict[int, Tensor] = {}  # tensors made while the mod runs, which it may write to

    def placeholder(self, content: Value | View, shares: bool = False) -> Placeholder:
        """Raises `TraceError` where gradients are off: the generated derivative would not know."""
        if not torch.is_grad_enabled():
            raise without_gradient()
        dtype = content.nodes[0].dtype if isinstance(content, Value) else IR_DTYPE[content.base.dtype]
        requires_grad = dtype.is_float and self.requires_grad
        made: Placeholder = make_wrapper_subclass(
            Placeholder, content.shape, dtype=TORCH_DTYPE[dtype], device=self.device, requires_grad=requires_grad
        )
        made.content = content
        made.recorder, made.shares = self, shares
        return made

    def scalar(self, node: Node) -> Placeholder:
        return self.placeholder(Value((), (node,)))

    # ---- calls

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _find_placeholder((args, kwargs)) is None:
            return self._run(func, args, kwargs)
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "__set__"):
            return self._attribute(func, name, args)
        if name in QUERIES:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name in _VALUE_READS:
            raise value_read(name)
        if name in RANDOM:
            raise random_number(name)
        if name == "__setitem__":
            raise write(name)
        if name == "__getitem__":
            return self._getitem(*args)
        if name in ("__iter__", "unbind"):
            return self._iterate(args[0])
        name, in_place = canonical(name)
        if in_place and not isinstance(args[0], Placeholder):
            raise write(name)
        result = self._compute(func, name, args, kwargs)
        if in_place:
            if not isinstance(args[0].content, Value) or args[0].shares:
                raise write(name, args[0].shares)
            args[0].content = result
            return args[0]
        if name in RETURNS_ITSELF and isinstance(args[0], Placeholder) and args[0].content == result:
            return args[0]  # so that what is done to one in place is done to the other
        return self.placeholder(result, name == "detach")

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call without placeholders: it runs once, so it must neither be random nor leave a trace."""
        name = getattr(func, "__name__", "")
        asked = getattr(func.__self__, "__name__", "") if name == "__get__" else name
        self.hoists |= asked not in _SIGNATURE
        if name in RANDOM and not (name == "dropout" and kwargs.get("training") is False):
            raise random_number(name)
        writes = name == "__setitem__" or (name.endswith("_") and not name.startswith("__")) or canonical(name)[1]
        if writes and name != "requires_grad_" and args and isinstance(args[0], Tensor):
            base = base_of(args[0])
            root = args[0] if base is None else base
            if id(root) not in self._own:
                raise write(name)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._own[id(result)] = result
        return result

    def _attribute(self, func: Any, name: str, args: tuple[Any, ...]) -> Any:
        attribute = getattr(func.__self__, "__name__", "") if name == "__get__" else ""
        if attribute in ("T", "mT"):
            return self._transposed(args[0].content, attribute)
        if attribute == "data":
            return self.call(Tensor.detach, args[:1], {})
        if attribute not in ATTRIBUTES:
            raise unsupported(f".{attribute or 'an attribute assignment'}")
        with DisableTorchFunctionSubclass():
            return func(*args)

    def _compute(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        if func is Tensor.where:
            args = (args[1], args[0], *args[2:])
        if name in REDUCTIONS and not (name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor)):
            return reduce(name, self._value(args[0]), args[1:], kwargs)
        if name in ("max", "min"):
            name = "maximum" if name == "max" else "minimum"
        if name in PRODUCTS:
            return product(name, *map(self._row, (*args, *kwargs.values())))
        if name in SHAPE_ONLY:
            value = self._value(args[0])
            if value.shape == () and keeps_one(name, [*args[1:], *kwargs.values()]):
                return value
        if name not in FUNCTIONS:
            raise unsupported(getattr(func, "__name__", str(func)))
        kwargs.pop("inplace", None)
        return self._elementwise(FUNCTIONS[name], name, args, kwargs)

    # ---- operands

    def _elementwise(
        self, builder: Callable[..., Node], name: str, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Value:
        names = parameters(builder)
        keys = [names[i] if i < len(names) and names[i] in BY_VALUE else i for i in range(len(args))] + [*kwargs]
        given = [*args, *kwargs.values()]
        operands = {k: self._operand(x, k) for k, x in zip(keys, given, strict=True)}
        if name == "pow" and isinstance(given[1], float):  # an exponent is part of the program
            operands[keys[1]] = Value((), (weak(given[1]),))
        values = {k: v for k, v in operands.items() if isinstance(v, Value)}
        ranked = any(v.shape for v in values.values())
        for k, x in operands.items():
            if isinstance(x, Tensor):  # a captured tensor with dimensions
                if not ranked:
                    raise TraceError(
                        f"uses a captured tensor of shape {tuple(x.shape)} in `{name}` without indexing it",
                        "The mod computes one number for one (b, h, q_idx, kv_idx), so it needs one element of the tensor.",
                        f"index every dimension, e.g. t[{', '.join(['b', 'h', 'q_idx', 'kv_idx'][-x.dim() :])}]",
                    )
                values[k] = operands[k] = self._unroll(View(x, (None,) * x.dim()))
        shape = torch.broadcast_shapes(*(v.shape for v in values.values())) if ranked else ()
        results = []
        for position in itertools.product(*map(range, shape)):
            call = {k: pick(values[k], position) if k in values else operands[k] for k in operands}
            positional = [call[k] for k in keys[: len(args)]]
            try:
                results.append(builder(*positional, **{k: call[k] for k in kwargs}))
            except TypeError as error:
                raise TraceError(
                    f"calls `{name}` with arguments a kernel cannot take ({error})",
                    "Options that change shape, device or memory have no meaning for a single number.",
                    f"`{name}` with its operands only",
                ) from error
        return Value(tuple(shape), tuple(results))

    def _operand(self, item: Any, key: int | str) -> Any:
        """A `Value` for what takes part in arithmetic, a Tensor for one left unindexed, anything else as it is."""
        if isinstance(item, Placeholder):
            return self._value(item)
        if isinstance(item, Tensor):
            return Value((), (self._captured_scalar(item),)) if item.dim() == 0 else item
        if key in ("alpha", "beta", "threshold", "negative_slope", "approximate", "rounding_mode", "dtype"):
            return item
        if isinstance(item, (bool, int, float, torch.SymInt, torch.SymFloat)):
            return Value((), (self.number(item),))
        return item

    def number(self, item: Any) -> Node:
        """A Python number. Finite floats are run-time values: a new one needs no new kernel."""
        if isinstance(item, (bool, int)):
            return weak(item)
        if isinstance(item, torch.SymInt):
            return Node(Op.INT, (), DType.INT64, Kind.WEAK, number_of(item, self.ints))
        if isinstance(item, torch.SymFloat):
            # A multiplication is what Inductor can turn back into a graph input.
            self.floats.append(torch.ones((), dtype=torch.float64) * item)  # type: ignore[operator]
        elif math.isfinite(item):
            self.floats.append(item)
        else:
            return weak(item)
        return Node(Op.FLOAT, (), current_default_float(), Kind.WEAK, len(self.floats) - 1)

    def _captured_scalar(self, tensor: Tensor) -> Node:
        return load(self._capture(tensor))

    def _capture(self, tensor: Tensor) -> Node:
        if tensor.dtype not in IR_DTYPE:
            raise TraceError(
                f"captures a tensor of dtype {tensor.dtype}",
                "Kernels have no such type.",
                "t.float() or t.long(), outside the mod",
            )
        number = self._number.get(id(tensor))
        if number is None:
            number = self._number[id(tensor)] = len(self.captured)
            self.captured.append(tensor)
        return Node(Op.CAPTURED, (), IR_DTYPE[tensor.dtype], Kind.ELEMENT, (number, tensor.dim()))

    def _value(self, item: Placeholder) -> Value:
        with DisableTorchFunction():
            applied = item.grad_fn is not None
        if applied:
            raise own_gradient()
        return item.content if isinstance(item.content, Value) else self._unroll(item.content)

    def _row(self, item: Any) -> Value:
        """What is multiplied, a captured tensor as it is or a traced value."""
        return self._value(item) if isinstance(item, Placeholder) else self._unroll(View(item, (None,) * item.dim()))

    def _transposed(self, content: Value | View, attribute: str) -> Placeholder:
        if isinstance(content, Value):
            return self.placeholder(transposed(content))
        if attribute == "T" and len(content.free) > 2:
            raise unsupported(".T of more than two dimensions")
        with DisableTorchFunctionSubclass():
            return self.placeholder(content.transposed())

    def _unroll(self, view: View) -> Value:
        """A view with short dimensions left, as a vector of loads."""
        shape = view.shape
        if math.prod(shape) > MAX_UNROLLED:
            raise TraceError(
                f"uses a part of shape {shape} of a captured tensor of shape {tuple(view.base.shape)}",
                f"Only up to {MAX_UNROLLED} elements can be unrolled into the kernel.",
                "index every dimension, or reduce the tensor outside the mod",
            )
        base = self._capture(view.base)
        nodes = []
        for position in itertools.product(*map(range, shape)):
            rest = iter(position)
            index = [const(next(rest), DType.INT64, Kind.SCALAR) if s is None else s for s in view.slots]
            nodes.append(load(base, *index))
        return Value(shape, tuple(nodes))

    # ---- indexing and reduction

    def _getitem(self, target: Any, index: Any) -> Placeholder:
        items = list(index) if isinstance(index, tuple) else [index]
        if isinstance(target, Placeholder) and isinstance(target.content, Value):
            return self._index_vector(target.content, items)
        view = target.content if isinstance(target, Placeholder) else View(target, (None,) * target.dim())
        assert isinstance(view, View)
        free = view.free
        if any(i is Ellipsis for i in items):
            at = next(n for n, i in enumerate(items) if i is Ellipsis)
            items[at : at + 1] = [slice(None)] * (len(free) - len(items) + 1)
        for item in items:
            if item is None or isinstance(item, bool):
                self._index(item)  # raises
        if len(items) > len(free):
            raise TraceError(
                f"indexes a tensor of {len(free)} dimensions with {len(items)} indices",
                "There is one index for each dimension.",
                ("t[()]", "t[h]", "t[q_idx, kv_idx]", "t[h, q_idx, kv_idx]", "t[b, h, q_idx, kv_idx]")[
                    min(len(free), 4)
                ]
                + ", or whichever indices the dimensions stand for",
            )
        base, slots = view.base, list(view.slots)
        for dim, item in zip(free, items, strict=False):
            if isinstance(item, slice):
                if item != slice(None):
                    with DisableTorchFunctionSubclass():
                        base = base[(slice(None),) * dim + (item,)]
            else:
                slots[dim] = self._index(item)
        view = View(base, tuple(slots))
        return self.placeholder(view) if view.shape else self.scalar(load(self._capture(base), *known(view.slots)))

    def _index(self, item: Any) -> Node:
        node = None
        if isinstance(item, Placeholder):
            value = self._value(item)
            node = value.nodes[0] if value.shape == () else None
        elif isinstance(item, Tensor) and item.dim() == 0:
            node = self._captured_scalar(item)
        elif isinstance(item, (int, torch.SymInt)) and not isinstance(item, bool):
            node = self.number(item)
            return cast(node, DType.INT64)
        if node is None:
            raise TraceError(
                f"indexes a captured tensor with {type(item).__name__} {item if item is None else ''}".rstrip(),
                "Only integers, scalar index expressions, `:` and `...` have a meaning for a single element.",
                "t[b, h, q_idx, kv_idx]",
            )
        if not node.dtype.is_int:
            fix = "torch.where(condition, t[1], t[0])" if node.dtype is DType.BOOL else "t[index.to(torch.int64)]"
            raise TraceError(
                f"indexes a captured tensor with a {node.dtype.value} value", "An index is an integer.", fix
            )
        return node

    def _index_vector(self, value: Value, items: list[Any]) -> Placeholder:
        if len(items) == 1 and isinstance(items[0], int) and len(value.shape) == 1:
            return self.scalar(value.nodes[items[0]])
        raise TraceError(
            "indexes a value that was computed in the mod",
            "Only captured tensors are in memory and can be indexed with a traced index.",
            "the index on the captured tensor itself, before the arithmetic: f(t[q_idx]) instead of f(t)[q_idx]",
        )

    def _iterate(self, target: Placeholder) -> Any:
        value = self._value(target)
        if len(value.shape) != 1:
            raise TraceError(
                "iterates over a traced scalar",
                "It is one number, not a sequence.",
                "the scalar itself, or a row t[h] of a tensor",
            )
        return iter([self.scalar(n) for n in value.nodes])
