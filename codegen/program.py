"""The program text: one traced variant as a self-contained, canonical string.

It is what travels: an argument of the torch operators, a key of caches, a line in an exported archive. Any process can
rebuild the kernel from it. It is parsed by the grammar below and never evaluated as Python.

    program  := "flexattn 1" NL "score" DTYPE NL header* line* result*
    header   := "captured cN DTYPE RANK" | "float fN DTYPE" | "int iN"
    line     := tN "=" OP "(" operand ("," operand)* ")"
    operand  := INPUT | cN | fN | iN | tN | DTYPE "(" literal ")" | DTYPE      (the last only in cast)
    result   := "return score" operand | "return mask" operand

Captured tensors and run-time numbers are numbered in the order of first use, operations in the order of evaluation.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import NamedTuple

from . import spec
from .errors import ProgramError
from .ir import INDEX_INPUTS, DType, Kind, Node, Op, const, input_node, walk

_HEAD = "flexattn 1"


class Parsed(NamedTuple):
    """A program as graphs: the modified score, and the mask or None where everything is attended."""

    score: Node
    mask: Node | None
    score_dtype: DType
    captured: tuple[tuple[DType, int], ...]  # dtype and rank of c0, c1, ...
    n_floats: int
    n_ints: int


class Printed(NamedTuple):
    """A program text, and which of the caller's captured tensors and numbers it uses, in the order of their new numbers."""

    text: str
    captured: tuple[int, ...]
    floats: tuple[int, ...]
    ints: tuple[int, ...]


@lru_cache(maxsize=1024)  # also keeps the nodes alive, so that tracing the same mod again finds them
def print_program(score: Node, mask: Node | None, score_dtype: DType) -> Printed:
    """The canonical text of a variant. Unused captured tensors and numbers are dropped, the others keep their order."""
    roots = (score,) if mask is None else (score, mask)
    nodes = list(walk(*roots))
    captured = {n.value[0]: n for n in nodes if n.op is Op.CAPTURED and isinstance(n.value, tuple)}
    # One line for each dtype that a number is read as.
    floats = {(int(n.value), n.dtype.value): n for n in nodes if n.op is Op.FLOAT and isinstance(n.value, int)}
    ints = {int(n.value): n for n in nodes if n.op is Op.INT and isinstance(n.value, int)}
    lines = [_HEAD, f"score {score_dtype.value}"]
    names: dict[Node, str] = {}
    for new, old in enumerate(sorted(captured)):
        node = captured[old]
        assert isinstance(node.value, tuple)
        names[node] = f"c{new}"
        lines.append(f"captured c{new} {node.dtype.value} {node.value[1]}")
    for new, read in enumerate(sorted(floats)):
        names[floats[read]] = f"f{new}"
        lines.append(f"float f{new} {floats[read].dtype.value}")
    for new, old in enumerate(sorted(ints)):
        names[ints[old]] = f"i{new}"
        lines.append(f"int i{new}")
    count = 0
    for node in nodes:
        if node in names:
            continue
        if node.op is Op.INPUT:
            names[node] = str(node.value)
        elif node.op is Op.CONST:
            names[node] = f"{node.dtype.value}({node.value!r})"
        else:
            operands = [names[a] for a in node.args]
            if node.op is Op.CAST:
                operands.append(node.dtype.value)
            names[node] = f"t{count}"
            lines.append(f"t{count} = {node.op.value}({', '.join(operands)})")
            count += 1
    lines.append(f"return score {names[score]}")
    if mask is not None:
        lines.append(f"return mask {names[mask]}")
    return Printed("\n".join(lines), tuple(sorted(captured)), tuple(n for n, _ in sorted(floats)), tuple(sorted(ints)))


_LINE = re.compile(r"(t\d+) = (\w+)\((.*)\)")
_CONST = re.compile(r"(\w+)\((.*)\)")
_OPERAND = re.compile(r"\w+\([^()]*\)|\w+")
_OPS = {op.value: op for op in Op}
_DTYPES = {d.value: d for d in DType}


def parse(text: str) -> Parsed:
    """The graphs of a program text. Raises `ProgramError` for anything the grammar or `spec` does not allow."""
    lines = text.split("\n")
    if len(lines) < 3 or lines[0] != _HEAD:
        raise ProgramError(f"not a flexattn program: it must begin with {_HEAD!r}")
    names: dict[str, Node] = {n: input_node(n, DType.INT32) for n in INDEX_INPUTS}
    captured: list[tuple[DType, int]] = []
    floats = ints = 0
    results: dict[str, Node] = {}
    score_dtype = DType.FLOAT32
    for number, line in enumerate(lines[1:], start=2):
        match line.split(" "):
            case ["score", dtype] if dtype in _DTYPES and _DTYPES[dtype].is_float:
                score_dtype = _DTYPES[dtype]
                names["score"] = input_node("score", score_dtype)
            case ["captured", name, dtype, rank] if dtype in _DTYPES and rank.isdigit() and name == f"c{len(captured)}":
                value = (len(captured), int(rank))
                captured.append((_DTYPES[dtype], int(rank)))
                names[name] = Node(Op.CAPTURED, (), _DTYPES[dtype], Kind.ELEMENT, value)
            case ["float", name, dtype] if dtype in _DTYPES and name == f"f{floats}":
                names[name] = Node(Op.FLOAT, (), _DTYPES[dtype], Kind.WEAK, floats)
                floats += 1
            case ["int", name] if name == f"i{ints}":
                names[name] = Node(Op.INT, (), DType.INT64, Kind.WEAK, ints)
                ints += 1
            case ["return", ("score" | "mask") as which, *operand]:
                results[which] = _operand(" ".join(operand), names, number)
            case _:
                _define(line, names, number)
    if "score" not in results:
        raise ProgramError("a program must return a score")
    score, mask = results["score"], results.get("mask")
    if score.dtype is not score_dtype or (mask is not None and mask.dtype is not DType.BOOL):
        raise ProgramError(f"a program returns a {score_dtype.value} score and a bool mask")
    if mask is not None and "score" in mask.axes:
        raise ProgramError("a mask may not depend on the score")
    spec.check([score] if mask is None else [score, mask])
    return Parsed(score, mask, score_dtype, tuple(captured), floats, ints)


def _define(line: str, names: dict[str, Node], number: int) -> None:
    match = _LINE.fullmatch(line)
    if match is None or match[2] not in _OPS or match[1] in names:
        raise ProgramError(f"line {number} of the program is not understood: {line!r}")
    op = _OPS[match[2]]
    words = _OPERAND.findall(match[3])
    if ", ".join(words) != match[3] or not words:
        raise ProgramError(f"line {number} of the program has malformed operands: {line!r}")
    if op is Op.CAST:
        if len(words) != 2 or words[1] not in _DTYPES:
            raise ProgramError(f"line {number} of the program: a cast names its dtype: {line!r}")
        source = _operand(words[0], names, number)
        node = Node(op, (source,), _DTYPES[words[1]], max(source.kind, Kind.SCALAR))
    else:
        operands = [_operand(w, names, number) for w in words]
        if op is Op.LOAD:
            node = spec.load(*operands)
        elif (op is Op.WHERE and len(operands) == 3) or (
            op in spec.SIGNATURES and len(operands) == spec.SIGNATURES[op].arity
        ):
            node = spec.apply(op, *operands)
        else:
            raise ProgramError(f"line {number} of the program: wrong number of operands for {op.value}: {line!r}")
    names[match[1]] = node


def _operand(word: str, names: dict[str, Node], number: int) -> Node:
    if word in names:
        return names[word]
    match = _CONST.fullmatch(word)
    if match is not None and match[1] in _DTYPES:
        dtype = _DTYPES[match[1]]
        try:
            if dtype is DType.BOOL:
                return const({"True": True, "False": False}[match[2]], dtype, Kind.SCALAR)
            value = float(match[2]) if dtype.is_float else int(match[2])
        except (KeyError, ValueError):
            raise ProgramError(f"line {number} of the program: {word!r} is not a literal") from None
        if dtype.is_float and math.isnan(value):
            value = math.nan
        return const(value, dtype, Kind.SCALAR)
    raise ProgramError(f"line {number} of the program: {word!r} is not defined")
