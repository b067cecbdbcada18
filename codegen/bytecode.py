"""What a function can reach without being called: the names that its bytecode reads, as chains of attributes.

In: a code object. Out: a `Plan` of the chains that begin at its closure, its globals and the object it is bound to, and
of the attributes that it reads from anything else. Code that does more than read, compute and call is refused.
"""

from __future__ import annotations

import dis
import re
import threading
from types import CodeType
from typing import Any

from .calls import FUNCTIONS
from .recorder import ATTRIBUTES, QUERIES
from .rows import REDUCTIONS
from .spellings import SHAPE_ONLY, canonical

Chain = tuple[str, ...]  # attribute names, outermost object first

# What may be read from a value whose origin the bytecode does not show. None of these changes the value.
_TABLES = frozenset(FUNCTIONS) | REDUCTIONS | SHAPE_ONLY | ATTRIBUTES | QUERIES
_OF_CONTAINERS = frozenset(("get", "items", "keys", "values", "index", "count"))
_OF_TENSORS = frozenset(("T", "mT", "matmul", "dot", "inner", "unbind"))

_SILENT = frozenset(("NOP", "CACHE", "EXTENDED_ARG", "RESUME"))
# Python 3.10 to 3.14. What is not here (imports, assignments to attributes, items and globals, `with`, `except`, generators,
# classes, formatting) may do what a key cannot hold.
_ALLOWED = re.compile(
    r"LOAD_CONST|LOAD_SMALL_INT|LOAD_ASSERTION_ERROR|RETURN_VALUE|RETURN_CONST|RAISE_VARARGS|RERAISE"
    r"|(LOAD|STORE)_FAST\w*|DELETE_FAST|LOAD_GLOBAL|LOAD_DEREF|STORE_DEREF|LOAD_CLOSURE|LOAD_ATTR|LOAD_METHOD"
    r"|MAKE_CELL|COPY_FREE_VARS|MAKE_FUNCTION|SET_FUNCTION_ATTRIBUTE|KW_NAMES|PRECALL|PUSH_NULL"
    r"|CALL|CALL_KW|CALL_FUNCTION\w*|CALL_METHOD|CALL_INTRINSIC_1"
    r"|POP_TOP|COPY|SWAP|ROT_\w+|DUP_TOP\w*|NOT_TAKEN|TO_BOOL"
    r"|BINARY_\w+|INPLACE_\w+|UNARY_\w+|COMPARE_OP|IS_OP|CONTAINS_OP"
    r"|BUILD_(TUPLE|LIST|MAP|CONST_KEY_MAP|SLICE)|LIST_(EXTEND|TO_TUPLE|APPEND)|MAP_ADD|DICT_(MERGE|UPDATE)"
    r"|UNPACK_SEQUENCE|UNPACK_EX|GET_ITER|FOR_ITER|END_FOR|POP_ITER|JUMP_\w+|POP_JUMP_\w+"
)
_INTRINSICS = ("INTRINSIC_LIST_TO_TUPLE", "INTRINSIC_UNARY_POSITIVE")


def is_understood(name: str) -> bool:
    """Whether an attribute of this name may be read from any tensor, number or container that a mod computes."""
    return canonical(name)[0] in _TABLES or name in _OF_CONTAINERS or name in _OF_TENSORS


class Plan:
    """What one code object can reach. Compared by identity: there is one for each code object, which it keeps alive.

    Attributes:
        cells: numbers of free variables, each with the attributes read from it.
        globals: names of globals or builtins, the same.
        own: attributes read from the first argument, which is known if the function is a method.
        loose: names of attributes read from any other value.
        in_place: whether an operator such as `+=` is applied.
        rebinds: whether the first argument is assigned to.
        refusal: why nothing can be said; empty if something can.
    """

    __slots__ = ("cells", "code", "globals", "in_place", "loose", "own", "own_names", "rebinds", "refusal")

    def __init__(self, code: CodeType) -> None:
        self.code = code
        scan = _Scan(code)
        self.cells: tuple[tuple[int, Chain], ...] = tuple(sorted(scan.cells))
        self.globals: tuple[tuple[str, Chain], ...] = tuple(sorted(scan.globals))
        self.own: tuple[Chain, ...] = tuple(sorted(scan.own))
        self.own_names = frozenset(name for names in self.own for name in names)
        self.loose = frozenset(scan.loose)
        self.in_place: bool = scan.in_place
        self.rebinds: bool = scan.rebinds
        unknown = sorted(name for name in self.loose if not is_understood(name))
        if unknown and not scan.refusal:
            scan.refusal = f"it reads `.{unknown[0]}` of a value that it computes or is given"
        self.refusal: str = scan.refusal


_PLANS: dict[int, Plan] = {}
_LOCK = threading.Lock()
_CAPACITY = 4096


def plan_of(code: CodeType) -> Plan:
    """The plan of a code object, made once."""
    plan = _PLANS.get(id(code))
    if plan is not None and plan.code is code:
        return plan
    plan = Plan(code)
    with _LOCK:
        if len(_PLANS) >= _CAPACITY:
            _PLANS.clear()
        return _PLANS.setdefault(id(code), plan)


class _Scan:
    """One pass over the instructions. `root` is where the value on top of the stack comes from, `names` what was read."""

    def __init__(self, code: CodeType) -> None:
        self.code = code
        self.cells: set[tuple[int, Chain]] = set()
        self.globals: set[tuple[str, Chain]] = set()
        self.own: set[Chain] = set()
        self.loose: set[str] = set()
        self.in_place = self.rebinds = False
        self.refusal = ""
        self.root: tuple[str, Any] | None = None
        self.names: list[str] = []
        self.first = code.co_varnames[0] if code.co_argcount else None
        before = None
        for instruction in dis.get_instructions(code):
            if instruction.is_jump_target:  # the value may come from elsewhere
                self._end()
            if instruction.opname in _SILENT:
                continue
            self._read(instruction, before)
            before = instruction
        self._end()
        for inner in (c for c in code.co_consts if isinstance(c, CodeType)):
            self._nested(plan_of(inner))

    def _end(self) -> None:
        """The chain is complete: its value is used."""
        if self.root is not None:
            kind, place = self.root
            names = tuple(self.names)
            if kind == "own":
                self.own.add(names)
            elif kind == "cell":
                self.cells.add((place, names))
            else:
                self.globals.add((place, names))
        self.root, self.names = None, []

    def _begin(self, kind: str, name: str) -> None:
        """A local, or the value of a cell, is loaded, or a cell for a function inside, which says what it reads of it."""
        self._end()
        if kind != "LOAD_DEREF" and (name in self.code.co_cellvars or name in self.code.co_freevars):
            return
        if name == self.first:
            self.root = "own", None
        elif name in self.code.co_freevars:
            self.root = "cell", self.code.co_freevars.index(name)

    def _store(self, name: str) -> None:
        self._end()
        self.rebinds |= name == self.first
        if name in self.code.co_freevars:
            self.refusal = f"it assigns to `{name}`"

    def _read(self, instruction: dis.Instruction, before: dis.Instruction | None) -> None:
        name, value = instruction.opname, instruction.argval
        if not _ALLOWED.fullmatch(name):
            self.refusal = f"its bytecode has {name}"
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            if value.startswith("__"):
                self.refusal = f"it reads `.{value}`"
            if self.root is None:
                self.loose.add(value)
            else:
                self.names.append(value)
        elif name == "LOAD_GLOBAL":
            self._end()
            self.root = "global", value
        elif name in ("LOAD_DEREF", "LOAD_CLOSURE") or "_FAST" in name:
            # Newer versions join two loads or stores in one instruction.
            values = value if isinstance(value, tuple) else (value,)
            kinds = re.findall(r"LOAD_(?:FAST|DEREF|CLOSURE)|(?:STORE|DELETE)_FAST", name)
            if len(kinds) != len(values):
                self.refusal = f"its bytecode has {name}"
            for kind, local in zip(kinds, values, strict=False):
                self._begin(kind, local) if kind.startswith("LOAD") else self._store(local)
        elif name == "STORE_DEREF":
            self._store(value)
        else:
            self._end()
            if name.startswith("INPLACE_") or (name == "BINARY_OP" and instruction.argrepr.endswith("=")):
                self.in_place = True
            if name == "IS_OP" and not (before is not None and before.opname == "LOAD_CONST" and before.argval is None):
                self.refusal = "it compares objects with `is`"
            if name == "CALL_INTRINSIC_1" and instruction.argrepr not in _INTRINSICS:
                self.refusal = f"its bytecode has {instruction.argrepr}"

    def _nested(self, inner: Plan) -> None:
        """What a lambda or a comprehension inside reaches."""
        self.refusal = self.refusal or inner.refusal
        self.globals.update(inner.globals)
        self.loose |= inner.loose | inner.own_names  # whose first argument may be anything
        self.in_place |= inner.in_place
        for number, names in inner.cells:
            name = inner.code.co_freevars[number]
            if name in self.code.co_freevars:
                self.cells.add((self.code.co_freevars.index(name), names))
            elif name == self.first:
                self.own.add(names)
            else:
                self.loose.update(names)
