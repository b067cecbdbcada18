"""Graphs to the text of Triton functions: one variant in, the source of its device functions out.

    score_mod(score, b, h, q_idx, kv_idx, captured)                      the modified score
    mask_mod(b, h, q_idx, kv_idx, captured)                              True = attend
    score_mod_grad(grad, score, b, h, q_idx, kv_idx, captured)           d loss / d score
    row_grads(sums, grad, score, b, h, q_idx, kv_idx, keep, captured)    sums + gradients of captured tensors, over axis 1
    column_grads(...)                                                    the same, for a tile that lies transposed
    tile_grads(grad, score, b, h, q_idx, kv_idx, keep, captured, dcaptured, line, columns, tile, first)
                                                                         puts gradients of captured tensors where they belong

Indices and scores are tensors that broadcast against the score's tile. `captured` is a flat tuple: pointer, sizes and
strides of c0, the same of c1, ..., the run-time floats, the run-time ints. A kernel takes a Python float as float32, so a
run-time float64 comes as the integer of its bits. `sums` holds a float32 vector for each load that is summed. `dcaptured` is
flat, too: the buffer of each load that goes by tile, and its strides where it has the tensor's shape, or a second buffer for
the first diagonals of tiles, or the entries of elements. Element (q, kv) of a workspace stands at (line + q) * columns + kv,
if it is not by tiles, of which this is number `tile`, with `first` the kv_idx - q_idx of its first element. The text is the
same for the same graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import NamedTuple

from .access import WORKSPACES, Method, Methods
from .distances import converted_apart
from .formula import formula, gradients
from .ir import DType, Node, Op, walk
from .pipeline import Variant
from .triton_text import SPELLING, TRITON_DTYPE, literal, never_negative, typed

_LOW = frozenset((DType.FLOAT16, DType.BFLOAT16))  # computed in float32, rounded after every operation
_INDICES = "b, h, q_idx, kv_idx"
_BY_TILE: tuple[Method, ...] = ("diagonal", "store", "workspace", "sorted", "atomic")


class _Collected(NamedTuple):
    load: Node
    gradient: Node
    method: Method


class Dialect(NamedTuple):
    """The language that is printed: what its module is called."""

    prefix: str


TRITON = Dialect("tl")


class Function(NamedTuple):
    """A device function: its role, its content-derived name, its text, and the operation that each line computes.

    Lines are counted from 1; that of `def` is `first_line`, comments stand above it.
    """

    role: str
    name: str
    source: str
    first_line: int
    lines: dict[int, Node]


class Functions(NamedTuple):
    """What a variant's kernels call; None where the template does without (identity, no mask, nothing wanted)."""

    score_mod: Function | None
    mask_mod: Function | None
    score_mod_grad: Function | None
    row_grads: Function | None
    column_grads: Function | None
    tile_grads: Function | None


def functions(
    variant: Variant,
    methods: Methods = (),
    wide: Collection[int] = (),
    dialect: Dialect = TRITON,
    far: bool = False,
    fast_tanh: bool = False,
) -> Functions:
    """The device functions of a variant.

    `methods` says how the gradient of each of `variant.derivative.loads` is collected, None where it is not wanted; `wide`
    numbers captured tensors with more elements than a 32-bit offset reaches. `far`: whether there are positions from
    `distances.NEAR` on. `fast_tanh`: whether tanh is the GPU's own instruction, which is less exact.
    """
    near = list if far else converted_apart
    (score,) = near([variant.unscaled])
    to_score = variant.derivative.score
    if to_score is not None:
        (to_score,) = near([to_score])

    def printer(role: str) -> _Printer:
        return _Printer(variant, role, dialect.prefix, wide, fast_tanh)

    def collector(role: str, *which: Method) -> Function | None:
        pairs = zip(variant.derivative.loads, methods, strict=False)
        found = [_Collected(load, near([grad])[0], method) for (load, grad), method in pairs if method in which]
        return printer(role).collect(found) if found else None

    grad_function = None
    if to_score is None or to_score.op is not Op.INPUT or to_score.value != "grad":
        grad_function = printer("score_mod_grad").single(to_score, f"grad, score, {_INDICES}, captured")
    return Functions(
        printer("score_mod").single(score, f"score, {_INDICES}, captured") if variant.modifies_score else None,
        None if variant.mask is None else printer("mask_mod").single(variant.mask, f"{_INDICES}, captured"),
        grad_function,
        collector("row_grads", "row"),
        collector("column_grads", "column"),
        collector("tile_grads", *_BY_TILE),
    )


def captured_positions(variant: Variant) -> tuple[list[int], int, int]:
    """Where the flat tuple `captured` holds each tensor's pointer, the first run-time float, and the first int."""
    starts, at = [], 0
    for _, rank in variant.captured:
        starts.append(at)
        at += 1 + 2 * rank
    return starts, at, at + variant.n_floats


class _Printer:
    """Prints one function."""

    def __init__(self, variant: Variant, role: str, prefix: str, wide: Collection[int], fast_tanh: bool) -> None:
        self.variant, self.role, self.tl, self.wide, self.fast_tanh = variant, role, prefix, wide, fast_tanh
        self.starts, self.first_float, self.first_int = captured_positions(variant)
        self.body: list[str] = []
        self.names: dict[Node, str] = {}
        self.header: dict[str, str] = {}  # what is unpacked from the tuples
        self.computes: dict[int, Node] = {}  # which operation a line of the body belongs to
        self.places: dict[tuple[Node, str], str] = {}  # names of positions that are in range already
        self.count = 0

    def single(self, root: Node | None, parameters: str) -> Function:
        """A function that returns one value."""
        if root is None:
            self.body.append(f"return {self.tl}.zeros_like(grad)")
            return self._finish(parameters, "d score = 0")
        self._lines([root])
        result = self.names[root]
        if root.is_const:
            result = typed(root, self.tl)
        tile = {"score_mod": "score", "score_mod_grad": "grad"}.get(self.role)
        if tile is not None and not root.axes & {"score", "grad"}:
            result = f"{self.tl}.broadcast_to({result}, {tile}.shape)"
        self.body.append(f"return {result}")
        what = {"score_mod": "score'", "mask_mod": "keep", "score_mod_grad": "d score"}[self.role]
        return self._finish(parameters, formula({what: root}))

    def collect(self, loads: Sequence[_Collected]) -> Function:
        """A function that takes the gradients of loads out of a tile."""
        tl = self.tl
        summed, at = [], 0
        for i, (load, gradient, method) in enumerate(loads):
            self._lines([*(load.args[1:] if method in ("store", "sorted", "atomic") else ()), gradient])
            self.body.append(f"g{i} = {tl}.where(keep, {self.names[gradient]}.to({tl}.float32), 0.0)")
            if method in ("row", "column"):
                summed.append(f"sums[{i}] + {tl}.sum(g{i}, 1)")
            else:
                self._put(i, load, method, at)
                at += WORKSPACES.get(method, len(load.args))  # or the buffer and its strides
        rest = f"grad, score, {_INDICES}, keep, captured"
        note = gradients(None, [(c.load, c.gradient) for c in loads])
        if not summed:
            return self._finish(f"{rest}, dcaptured, line, columns, tile, first", note)
        self.body.append(f"return ({', '.join(summed)},)")
        return self._finish(f"sums, {rest}", note)

    def _put(self, i: int, load: Node, method: Method, at: int) -> None:
        """Lines that put the gradients `g{i}` of a tile into the buffer at `dcaptured[at]`."""
        tl = self.tl
        target = self._unpack(f"d{i}", "dcaptured", at)
        if method in ("diagonal", "sorted"):
            second = self._unpack(f"e{i}", "dcaptured", at + 1)
            if method == "diagonal":
                self.body.append(f"device.store_diagonals({target}, {second}, g{i}, first, tile)")
            else:
                self.body.append(f"device.store_elements({target}, {second}, g{i}, {self._entry(load)}, tile)")
            return
        if method == "workspace":
            address = f"{target} + ((line + q_idx) * columns + kv_idx)"
        else:
            strides = [self._unpack(f"d{i}_stride{d}", "dcaptured", at + 1 + d) for d in range(len(load.args) - 1)]
            places = self._places(load)
            address = " + ".join([target, *(f"{p} * {s}" for p, s in zip(places, strides, strict=True))])
        self.body.append(f"at{i} = {tl}.broadcast_to({address}, g{i}.shape)")
        if method == "atomic":
            self.body.append(f'{tl}.atomic_add(at{i}, g{i}, mask=keep, sem="relaxed")')
        else:
            self.body.append(f"{tl}.store(at{i}, g{i}, mask=keep)")

    def _finish(self, parameters: str, note: str) -> Function:
        head = [f"# {line}" for line in note.splitlines()]
        unpacked = [f"    {name} = {value}" for name, value in self.header.items()]
        signature = f"({parameters}):"
        body = [f"    {line}" for line in self.body]
        content = "\n".join([signature, *unpacked, *body])
        name = f"{self.role}_{hashlib.sha256(content.encode()).hexdigest()[:12]}"
        source = "\n".join([*head, f"def {name}{signature}", *unpacked, *body]) + "\n"
        first = len(head) + 1 + len(unpacked) + 1  # counted from 1
        return Function(self.role, name, source, len(head) + 1, {first + i: node for i, node in self.computes.items()})

    def _unpack(self, name: str, source: str, position: int) -> str:
        self.header.setdefault(name, f"{source}[{position}]")
        return name

    def _number(self, node: Node) -> str:
        """The name of a run-time float or int, unpacked as a tensor: Triton takes an int that is 1 for a constant."""
        assert isinstance(node.value, int)
        letter, first = ("f", self.first_float) if node.op is Op.FLOAT else ("i", self.first_int)
        tl, dtype = self.tl, TRITON_DTYPE[node.dtype]
        given = {DType.FLOAT64: "int64", DType.BFLOAT16: "float32", DType.FLOAT16: "float32"}.get(node.dtype, dtype)
        value = f"{tl}.full((), captured[{first + node.value}], {tl}.{given})"
        if given != dtype:
            value += f".to({tl}.{dtype}{', bitcast=True' if node.dtype is DType.FLOAT64 else ''})"
        self.header.setdefault(f"{letter}{node.value}", value)
        return f"{letter}{node.value}"

    def _lines(self, roots: Sequence[Node]) -> None:
        for node in walk(*roots):
            if node in self.names:
                continue
            if node.op is Op.INPUT:
                self.names[node] = str(node.value)
            elif node.op is Op.CONST:
                self.names[node] = literal(node, self.tl)
            elif node.op in (Op.FLOAT, Op.INT):
                self.names[node] = self._number(node)
            elif node.op is Op.DETACH or (node.op is Op.CAST and node.lhs.dtype is node.dtype):
                self.names[node] = self.names[node.lhs]
            elif node.op is Op.CAPTURED:
                self.names[node] = self._unpack(f"c{_base(node)}", "captured", self.starts[_base(node)])
            else:
                first = len(self.body)
                text = self._spell(node)  # which may put lines of its own before
                self.names[node] = f"t{self.count}"
                self.count += 1
                self.body.append(f"{self.names[node]} = {text}")
                self.computes |= dict.fromkeys(range(first, len(self.body)), node)

    def _spell(self, node: Node) -> str:
        tl, dtype = self.tl, f"{self.tl}.{TRITON_DTYPE[node.dtype]}"
        if node.op is Op.LOAD:
            return self._load(node)
        args = [self.names[a] for a in node.args]
        if all(a.is_const for a in node.args):  # an operation on literals would be Python's, not the device's
            args = [typed(a, tl) for a in node.args]
        if node.op is Op.CAST:
            # Of an integer a bfloat16 is made by way of float32, on a GPU as well; Triton's interpreter takes its bits.
            by = f".to({tl}.float32)" if node.dtype is DType.BFLOAT16 and not node.lhs.dtype.is_float else ""
            return f"{args[0]}{by}.to({dtype})"
        if node.op is Op.TANH and self.fast_tanh and node.dtype is not DType.FLOAT64:
            return f"device.fast_tanh({args[0]}).to({dtype})"
        if node.lhs.dtype not in _LOW or node.op is Op.WHERE:
            return SPELLING[node.op](node, args, tl)
        raised = [f"{a}.to({tl}.float32)" for a in args]
        text = SPELLING[node.op](node, raised, tl)
        return text if node.dtype is DType.BOOL else f"({text}).to({dtype})"

    def _load(self, node: Node) -> str:
        base = self.names[node.args[0]]
        parts = [base]
        first = self.starts[_number(node)] + 1
        rank = len(node.args) - 1
        for d, place in enumerate(self._places(node)):
            parts.append(f"{place} * {self._unpack(f'{base}_stride{d}', 'captured', first + rank + d)}")
        return f"{self.tl}.load({' + '.join(parts)})"

    def _entry(self, load: Node) -> str:
        """The number of the entry that is read, in a contiguous tensor of the shape."""
        entry = ""
        for d, place in enumerate(self._places(load)):
            size = f"c{_number(load)}_size{d}"
            entry = f"({entry}) * {size} + {place}" if entry else place
        return entry or f"{self.tl}.zeros((), {self.tl}.int32)"

    def _places(self, load: Node) -> list[str]:
        """Names of the position along each dimension, in range."""
        number = _number(load)
        result = []
        for d, index in enumerate(load.args[1:]):
            size = self._unpack(f"c{number}_size{d}", "captured", self.starts[number] + 1 + d)
            known = (index, size)
            if known not in self.places:
                function = "bound_index" if never_negative(index) else "wrap_index"
                text = typed(index, self.tl) if index.is_const else self.names[index]
                if number in self.wide:
                    text = f"{text}.to({self.tl}.int64)"
                self.places[known] = name = f"p{len(self.places)}"
                self.body.append(f"{name} = device.{function}({text}, {size})")
            result.append(self.places[known])
        return result


def _base(captured: Node) -> int:
    assert isinstance(captured.value, tuple)
    return captured.value[0]


def _number(load: Node) -> int:
    return _base(load.args[0])
