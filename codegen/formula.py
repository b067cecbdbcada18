"""IR as mathematics: an infix formula, with shared sub-expressions named, for people to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .ir import Node, Op, walk

# operator, precedence
_INFIX: dict[Op, tuple[str, int]] = {
    Op.LT: ("<", 1),
    Op.LE: ("<=", 1),
    Op.EQ: ("==", 1),
    Op.NE: ("!=", 1),
    Op.OR: ("|", 2),
    Op.XOR: ("^", 3),
    Op.AND: ("&", 4),
    Op.SHL: ("<<", 5),
    Op.SHR: (">>", 5),
    Op.ADD: ("+", 6),
    Op.SUB: ("-", 6),
    Op.MUL: ("*", 7),
    Op.DIV: ("/", 7),
    Op.FLOORDIV: ("//", 7),
    Op.MOD: ("%", 7),
    Op.POW: ("**", 9),
}
_PREFIX = {Op.NEG: "-", Op.NOT: "~"}
_TIGHT = 10
_ASSOCIATIVE = (Op.ADD, Op.MUL, Op.AND, Op.OR, Op.XOR)


def formula(roots: Mapping[str, Node], names: Mapping[str, str] | None = None) -> str:
    """One line `name = expression` a root, after lines for the sub-expressions they share.

    `names` renames captured tensors and run-time numbers (c0, f0, i0). Casts that keep the value are left out: they are in
    the program.
    """
    names = names or {}
    uses: Counter[Node] = Counter(a for node in walk(*roots.values()) for a in node.args)
    text: dict[Node, tuple[str, int]] = {}
    lines: list[str] = []
    shared = 0
    for node in walk(*roots.values()):
        text[node] = _print(node, text, names)
        if uses[node] > 1 and len(text[node][0]) > 12 and node not in roots.values():
            shared += 1
            lines.append(f"x{shared} = {text[node][0]}")
            text[node] = (f"x{shared}", _TIGHT)
    return "\n".join([*lines, *(f"{name} = {text[node][0]}" for name, node in roots.items())])


def inline(node: Node, names: Mapping[str, str] | None = None) -> str:
    """A node on one line, nothing shared: a label."""
    text: dict[Node, tuple[str, int]] = {}
    for n in walk(node):
        text[n] = _print(n, text, names or {})
    return text[node][0]


class Line(NamedTuple):
    """An operation on values named before: `name = text`; a captured element has no other name than its text."""

    node: Node
    name: str
    text: str


def lines(roots: Sequence[Node], names: Mapping[str, str] | None = None) -> list[Line]:
    """Every operation below `roots` on a line of its own, in the order of evaluation. Casts are left out as in `formula`."""
    text: dict[Node, tuple[str, int]] = {}
    found: list[Line] = []
    count = 0
    for node in walk(*roots):
        text[node] = _print(node, text, names or {})
        words = text[node][0]
        if node.op is Op.LOAD:
            found.append(Line(node, "", words))
        elif node.args and all(text[a][0] != words for a in node.args):
            found.append(Line(node, f"t{count}", words))
            text[node] = (f"t{count}", _TIGHT)
            count += 1
    return found


def gradients(score: Node | None, loads: Sequence[tuple[Node, Node]], names: Mapping[str, str] | None = None) -> str:
    """A line `d score = ...`, and a line `d c0[...] = ...` for each load and the gradient of what it read."""
    roots: dict[str, Node] = {} if score is None else {"d score": score}
    for i, (load, grad) in enumerate(loads):
        roots |= {f"load {i}": load, f"grad {i}": grad}
    lines: list[str] = []
    place = ""
    for line in formula(roots, names).splitlines():
        name, _, text = line.partition(" = ")
        if name.startswith("load "):
            place = f"d {text}"
            while any(other.startswith(f"{place} = ") for other in lines):
                place += "'"
        else:
            lines.append(f"{place if name.startswith('grad ') else name} = {text}")
    return "\n".join(lines)


def _print(node: Node, text: Mapping[Node, tuple[str, int]], names: Mapping[str, str]) -> tuple[str, int]:
    op, args = node.op, node.args

    def inner(arg: Node, at_least: int) -> str:
        words, precedence = text[arg]
        return words if precedence >= at_least else f"({words})"

    if op is Op.INPUT:
        return str(node.value), _TIGHT
    if op is Op.CONST:
        return (f"{node.value:g}" if node.dtype.is_float else repr(node.value)), _TIGHT  # type: ignore[str-bytes-safe]
    if op in (Op.FLOAT, Op.INT, Op.CAPTURED):
        number = node.value[0] if isinstance(node.value, tuple) else node.value
        name = {Op.FLOAT: "f", Op.INT: "i", Op.CAPTURED: "c"}[op] + str(number)
        return names.get(name, name), _TIGHT
    if op is Op.CAST and args[0].dtype.is_float and node.dtype.is_int:
        return f"trunc({text[args[0]][0]})", _TIGHT
    if op in (Op.CAST, Op.DETACH):
        return text[args[0]]
    if op is Op.LOAD:
        base, *index = args
        where = ", ".join(text[i][0] for i in index)
        return text[base][0] + (f"[{where}]" if index else ""), _TIGHT
    if op in _PREFIX:
        return _PREFIX[op] + inner(args[0], 8), 8
    if op in (Op.LT, Op.LE) and str(args[0].value) == "kv_idx" and str(args[1].value) == "q_idx":
        sign = ">" if op is Op.LT else ">="  # the way round people write it
        return f"q_idx {sign} kv_idx", 1
    if op in _INFIX:
        sign, precedence = _INFIX[op]
        right = precedence if op in _ASSOCIATIVE else precedence + 1
        return f"{inner(args[0], precedence)} {sign} {inner(args[1], right)}", precedence
    return f"{op.value}({', '.join(text[a][0] for a in args)})", _TIGHT
