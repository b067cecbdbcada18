"""Integer and boolean graphs as sympy expressions and back: predicates simplified, comparisons solved for the key.

sympy's integers do not wrap, so what is said here holds where no integer of the graph wraps (`intervals.Context` tells).
Values that sympy is not told about, such as loads and floats, are symbols that stand for themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean

from .ir import DType, Node, Op, const, walk
from .linear import Limits, linear_limits
from .promotion import cast
from .spec import apply

_LARGEST = 60  # nodes of a comparison that is worth solving
_LOGIC_ATOMS = 8  # sympy's simplification of logic takes time exponential in these
KEY = sympy.Symbol("kv_idx", integer=True)


@dataclass
class Symbols:
    """Which symbol stands for which value, within one expression."""

    nodes: dict[sympy.Symbol, Node] = field(default_factory=dict)
    _known: dict[Node, Any] = field(default_factory=dict)

    def integer(self, node: Node) -> Any:
        """An integer node as an expression."""
        if node not in self._known:
            self._known[node] = self._integer(node)
        return self._known[node]

    def _integer(self, node: Node) -> Any:
        op, args = node.op, node.args
        if op is Op.CONST:
            return sympy.Integer(node.value)
        if op is Op.INPUT:
            return self._symbol(node, str(node.value))
        if op is Op.CAST and args[0].dtype.is_int and _holds(node.dtype, args[0].dtype):
            return self.integer(args[0])
        if op in _ARITHMETIC:
            return _ARITHMETIC[op](*(self.integer(a) for a in args))
        if op in _BY_CONSTANT and args[1].is_const and int(args[1].value or 0) > 0:  # type: ignore[arg-type]
            return _BY_CONSTANT[op](self.integer(args[0]), int(args[1].value or 0))  # type: ignore[arg-type]
        return self._symbol(node, f"x{len(self.nodes)}")

    def _symbol(self, node: Node, name: str, **assumptions: bool) -> sympy.Symbol:
        made = sympy.Symbol(name, **(assumptions or {"integer": True}))
        self.nodes[made] = node
        return made

    def predicate(self, node: Node) -> Boolean:
        """A boolean node as a formula; comparisons of integers are `expression <= 0` and `expression == 0`."""
        if node not in self._known:
            self._known[node] = self._predicate(node)
        found: Boolean = self._known[node]
        return found

    def _predicate(self, node: Node) -> Boolean:
        op, args = node.op, node.args
        if op is Op.CONST:
            return sympy.true if node.value else sympy.false
        if op in _LOGIC and node.dtype is DType.BOOL and args[0].dtype is DType.BOOL:
            return _LOGIC[op](*(self.predicate(a) for a in args))
        if op is Op.WHERE:
            c, a, b = (self.predicate(x) for x in args)
            return sympy.Or(sympy.And(c, a), sympy.And(sympy.Not(c), b))
        if op in _COMPARISONS and args[0].dtype.is_int:
            return _COMPARISONS[op](sympy.expand(self.integer(args[0]) - self.integer(args[1])))
        return self._symbol(node, f"p{len(self.nodes)}", boolean=True)

    def as_symbol(self, node: Node) -> sympy.Symbol:
        """A symbol for a node that was made."""
        return self._symbol(node, f"x{len(self.nodes)}")

    # ---- back

    def node(self, expression: Any) -> Node:
        """An integer expression as an int64 node."""
        if expression.is_Integer:
            return const(int(expression), DType.INT64)
        if expression in self.nodes:
            return cast(self.nodes[expression], DType.INT64)
        if isinstance(expression, sympy.floor):
            above, below = sympy.together(expression.args[0]).as_numer_denom()
            return apply(Op.FLOORDIV, self.node(sympy.expand(above)), self.node(below))
        if isinstance(expression, sympy.Pow) and expression.exp.is_Integer and expression.exp > 0:
            return apply(Op.POW, self.node(expression.base), self.node(expression.exp))
        if expression.is_Add:
            above, below = _sides(expression)
            if below != 0:
                if above == 0:
                    return apply(Op.NEG, self.node(below))
                return apply(Op.SUB, self.node(above), self.node(below))
        if isinstance(expression, sympy.Abs):
            return apply(Op.ABS, self.node(expression.args[0]))
        if expression.is_Mul and expression.could_extract_minus_sign():
            return apply(Op.NEG, self.node(-expression))
        if isinstance(expression, sympy.Mod):
            return apply(Op.MOD, *(self.node(a) for a in expression.args))
        parts = sorted(expression.args, key=sympy.default_sort_key)
        op = _BACK[expression.func]
        return reduce(lambda a, b: apply(op, a, b), (self.node(a) for a in parts))

    def boolean(self, formula: Boolean) -> Node:
        """A formula as a boolean node."""
        if formula in (sympy.true, sympy.false):
            return const(formula is sympy.true, DType.BOOL)
        if formula in self.nodes:
            return self.nodes[formula]
        if isinstance(formula, sympy.Not):
            return apply(Op.NOT, self.boolean(formula.args[0]))
        if isinstance(formula, (sympy.And, sympy.Or)):
            op = Op.AND if isinstance(formula, sympy.And) else Op.OR
            return reduce(lambda a, b: apply(op, a, b), (self.boolean(a) for a in formula.args))
        above, below = _sides(formula.lhs - formula.rhs)
        return apply(_RELATIONS[formula.func], self.node(above), self.node(below))


def _holds(target: DType, source: DType) -> bool:
    sizes = {DType.UINT8: 9, DType.INT8: 8, DType.INT16: 16, DType.INT32: 32, DType.INT64: 64}
    return target is source or (target is not DType.UINT8 and sizes[target] >= sizes[source])


def _sides(difference: Any) -> tuple[Any, Any]:
    """`difference` as above - below, with neither of them negated."""
    terms = sympy.Add.make_args(sympy.expand(difference))
    negative = [t for t in terms if t.could_extract_minus_sign()]
    return sympy.Add(*(t for t in terms if t not in negative)), -sympy.Add(*negative)


_ARITHMETIC: dict[Op, Callable[..., Any]] = {
    Op.ADD: lambda a, b: a + b,
    Op.SUB: lambda a, b: a - b,
    Op.MUL: lambda a, b: a * b,
    Op.NEG: lambda a: -a,
    Op.ABS: sympy.Abs,
    Op.MAXIMUM: sympy.Max,
    Op.MINIMUM: sympy.Min,
}
_BY_CONSTANT: dict[Op, Callable[[Any, int], Any]] = {
    Op.FLOORDIV: lambda a, c: sympy.floor(a / sympy.Integer(c)),
    Op.MOD: lambda a, c: sympy.Mod(a, c),
    Op.SHR: lambda a, c: sympy.floor(a / sympy.Integer(2**c)),
    Op.SHL: lambda a, c: a * 2**c,
}
_LOGIC: dict[Op, Callable[..., Boolean]] = {
    **{Op.AND: sympy.And, Op.OR: sympy.Or, Op.NOT: sympy.Not},
    Op.XOR: sympy.Xor,
    Op.EQ: lambda a, b: sympy.Not(sympy.Xor(a, b)),
    Op.NE: sympy.Xor,
}
_COMPARISONS: dict[Op, Callable[[Any], Boolean]] = {
    Op.LT: lambda d: sympy.Le(d + 1, 0),
    Op.LE: lambda d: sympy.Le(d, 0),
    Op.EQ: lambda d: sympy.Eq(d, 0),
    Op.NE: lambda d: sympy.Ne(d, 0),
}
_RELATIONS = {
    sympy.Le: Op.LE,
    sympy.Lt: Op.LT,
    sympy.Eq: Op.EQ,
    sympy.Ne: Op.NE,
}
_BACK = {
    sympy.Add: Op.ADD,
    sympy.Mul: Op.MUL,
    sympy.Max: Op.MAXIMUM,
    sympy.Min: Op.MINIMUM,
}


# ---- predicates


def simplified(mask: Node) -> Node:
    """A mask with comparisons in a common form, and those that follow from others left out; itself if that is no shorter."""
    symbols = Symbols()
    formula = symbols.predicate(mask)
    # A comparison and its opposite are one symbol and its negation.
    named: dict[Boolean, Boolean] = {}
    meaning: dict[Boolean, Boolean] = {}
    for relation in sorted(formula.atoms(sympy.core.relational.Relational), key=sympy.default_sort_key):
        plain, positive = _oriented(_at_most_zero(relation))
        symbol = sympy.Symbol(f"r_{plain.func.__name__}_{plain.lhs}")
        meaning[symbol] = plain
        named[relation] = symbol if positive else sympy.Not(symbol)
    formula = formula.xreplace(named)
    if len(formula.free_symbols) <= _LOGIC_ATOMS:
        formula = sympy.simplify_logic(formula)
    formula = sympy.to_nnf(formula, simplify=False).xreplace(meaning)
    formula = formula.xreplace({r: _at_most_zero(r) for r in formula.atoms(sympy.core.relational.Relational)})
    node = symbols.boolean(_tightened(formula))
    return node if _length(node) < _length(mask) else mask


def _length(node: Node) -> int:
    """How many operations a reader sees."""
    return sum(1 for n in walk(node) if n.args and n.op is not Op.CAST)


def _at_most_zero(relation: Any) -> Any:
    """A comparison of integers as `expression <= 0`, `== 0` or `!= 0`."""
    difference = sympy.expand(relation.lhs - relation.rhs)
    match type(relation):
        case sympy.StrictGreaterThan:
            return sympy.Le(1 - difference, 0)
        case sympy.GreaterThan:
            return sympy.Le(-difference, 0)
        case sympy.StrictLessThan:
            return sympy.Le(difference + 1, 0)
    return relation.func(difference, 0)


def _oriented(relation: Any) -> tuple[Any, bool]:
    """The one of a comparison and its opposite that stands for both, and whether it is the comparison itself."""
    if isinstance(relation, sympy.Ne):
        return sympy.Eq(relation.lhs, 0), False
    if isinstance(relation, sympy.Le) and relation.lhs.as_coeff_Add()[1].could_extract_minus_sign():
        return sympy.Le(sympy.expand(1 - relation.lhs), 0), False
    return relation, True


def _tightened(formula: Boolean) -> Boolean:
    """Of bounds on the same expression in a conjunction only the strongest, in a disjunction only the weakest."""
    if not isinstance(formula, (sympy.And, sympy.Or)):
        return formula
    strongest = isinstance(formula, sympy.And)
    kept: list[Boolean] = []
    bounds: dict[Any, Any] = {}
    for part in map(_tightened, formula.args):
        if isinstance(part, sympy.Le) and part.rhs == 0:
            constant, rest = part.lhs.as_coeff_Add()
            before = bounds.get(rest, constant)
            bounds[rest] = max(before, constant) if strongest else min(before, constant)
        else:
            kept.append(part)
    return formula.func(*kept, *(sympy.Le(rest + constant, 0) for rest, constant in bounds.items()))


# ---- solving for the key


@lru_cache(maxsize=1024)
def key_limits(comparison: Node) -> tuple[bool, tuple[Limits, ...]] | None:
    """A comparison of integers as limits of the key: whether all of them must hold (else any), and the limits.

    None if it is not linear in the key, or in the key divided by a constant.
    """
    if sum(1 for _ in walk(comparison)) > _LARGEST or _hides_key(comparison):
        return None
    plain = linear_limits(comparison)
    if plain is not None:
        return True, (plain,)
    symbols = Symbols()
    relation = symbols.predicate(comparison)
    if not isinstance(relation, (sympy.Le, sympy.Eq)) or KEY not in relation.free_symbols:
        return None
    if isinstance(relation, sympy.Eq):
        sides = [_below_zero(d, symbols) for d in (relation.lhs, -relation.lhs)]
        return None if None in sides else (True, tuple(s for s in sides if s is not None))
    sizes = [a for a in relation.lhs.atoms(sympy.Abs) if KEY in a.free_symbols]
    if not sizes:
        found = _below_zero(relation.lhs, symbols)
        return None if found is None else (True, (found,))
    if len(sizes) > 1 or not relation.lhs.coeff(sizes[0]).is_Integer:
        return None
    # |e| <= x: both of e and -e; x <= |e|: one of them.
    both = bool(relation.lhs.coeff(sizes[0]) > 0)
    parts = [
        _below_zero(sympy.expand(relation.lhs.subs(sizes[0], e)), symbols)
        for e in (sizes[0].args[0], -sizes[0].args[0])
    ]
    return None if None in parts else (both, tuple(p for p in parts if p is not None))


def _hides_key(comparison: Node) -> bool:
    """Whether the key is read through a tensor or a float, of which nothing can be solved."""
    return any("kv_idx" in n.axes and (n.op is Op.LOAD or n.dtype.is_float) for n in walk(comparison))


def _below_zero(expression: Any, symbols: Symbols) -> Limits | None:
    """`expression <= 0` as limits of the key; None also where sympy made of it what has no operation here."""
    try:
        return _solved(expression, symbols)
    except KeyError:
        return None


def _solved(expression: Any, symbols: Symbols) -> Limits | None:
    quotients = [f for f in expression.atoms(sympy.floor) if KEY in f.free_symbols]
    unknown, divisor = KEY, 1
    if quotients:
        quotient = quotients[0]
        above, below = quotient.args[0].as_numer_denom()
        if len(quotients) > 1 or above != KEY or not below.is_Integer:
            return None
        unknown, divisor = sympy.Dummy(integer=True), int(below)
        expression = expression.subs(quotient, unknown)
    factor = sympy.expand(expression).coeff(unknown)
    rest = sympy.expand(expression - factor * unknown)
    if not factor.is_Integer or factor == 0 or rest.free_symbols & {KEY, unknown}:
        return None
    if any(symbols.nodes[s].axes & {"kv_idx"} for s in rest.free_symbols):
        return None
    if factor > 0:  # unknown <= floor(-rest / factor)
        top = symbols.node(sympy.floor(-rest / factor))
        return Limits(
            None, symbols.node(sympy.expand(divisor * symbols.as_symbol(top) + divisor - 1)) if divisor > 1 else top
        )
    bottom = symbols.node(-sympy.floor(-rest / -factor))  # unknown >= ceil(rest / -factor)
    return Limits(symbols.node(divisor * symbols.as_symbol(bottom)) if divisor > 1 else bottom, None)
