"""The bounds of single operations against all their values: never too narrow, and exact where that is promised."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from flexattn.codegen.bounds import Bounds
from flexattn.codegen.bounds_of_floats import FLOAT
from flexattn.codegen.bounds_of_integers import INTEGER
from flexattn.codegen.evaluate import Inputs, evaluate
from flexattn.codegen.intervals import Context, bounds
from flexattn.codegen.ir import DType, Kind, Node, Op, const, input_node
from flexattn.codegen.promotion import cast
from flexattn.codegen.spec import SIGNATURES, apply

QUERY, KEY = (input_node(name, DType.INT32) for name in ("q_idx", "kv_idx"))
# Operands: the values of the index are moved to begin here. Divisors of one sign, small exponents and shifts.
SIGNED = [(-6, -3), (-3, -6), (-2, -3), (1, 2)]
DIVISORS = [(-3, 1), (-3, -6), (1, 1), (-7, -7)]
COUNTS = [(-3, 0), (0, 0), (1, 3)]
BEGINNINGS = {op: DIVISORS for op in (Op.FLOORDIV, Op.TRUNCDIV, Op.MOD, Op.FMOD)} | {
    op: COUNTS for op in (Op.POW, Op.SHL, Op.SHR)
}
SIZE = 6
EXACT = {Op.ADD, Op.SUB, Op.MUL, Op.MAXIMUM, Op.MINIMUM, Op.NEG, Op.ABS, Op.SIGN, Op.FLOORDIV, Op.TRUNCDIV, Op.NOT}


def boxes(size: int) -> tuple[Tensor, Tensor]:
    """All ranges of an axis."""
    pairs = [(lo, hi) for lo in range(size) for hi in range(lo, size)]
    return torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])


def assert_bounded(node: Node, exact: bool) -> None:
    """Compare with the values of all pairs of an index, in all pairs of ranges."""
    index = torch.arange(SIZE, dtype=torch.int32)
    (values,) = evaluate([node], Inputs({"q_idx": index.view(-1, 1), "kv_idx": index}))
    values = values.expand(SIZE, SIZE)
    lo, hi = boxes(SIZE)
    pairs = torch.cartesian_prod(torch.arange(len(lo)), torch.arange(len(lo))).unbind(-1)
    box = {"q_idx": Bounds(lo[pairs[0]], hi[pairs[0]]), "kv_idx": Bounds(lo[pairs[1]], hi[pairs[1]])}
    whole = {name: Bounds(torch.tensor([0]), torch.tensor([SIZE - 1])) for name in box}
    context = Context.of([node], Inputs({}), whole, 1 << 20)
    (found,) = bounds([node], box, context)
    low, high = found.lo.expand(len(pairs[0])).tolist(), found.hi.expand(len(pairs[0])).tolist()
    nan = (torch.tensor(False) if found.nan is None else found.nan).expand(len(pairs[0])).tolist()
    for i, (a, b) in enumerate(itertools.product(range(len(lo)), range(len(lo)))):
        part = values[int(lo[a]) : int(hi[a]) + 1, int(lo[b]) : int(hi[b]) + 1].flatten().tolist()
        numbers = [v for v in part if v == v]
        assert nan[i] or len(numbers) == len(part)
        if numbers:
            place = (node, (int(lo[a]), int(hi[a])), (int(lo[b]), int(hi[b])), (low[i], high[i]), numbers[:9])
            assert low[i] <= min(numbers) and max(numbers) <= high[i], place
            assert not exact or (low[i], high[i]) == (min(numbers), max(numbers)), place


def moved(index: Node, beginning: int, dtype: DType) -> Node:
    return cast(apply(Op.ADD, index, const(beginning, DType.INT32)), dtype)


@pytest.mark.parametrize("op", INTEGER, ids=lambda op: op.value)
@pytest.mark.parametrize("dtype", [DType.INT32, DType.INT8, DType.UINT8, DType.INT64], ids=lambda d: d.value)
def test_integers_lie_in_their_bounds(op: Op, dtype: DType) -> None:
    for first, second in BEGINNINGS.get(op, SIGNED):
        if dtype is DType.UINT8 and (second < 0 or op is Op.POW):
            continue
        args = [moved(QUERY, first, dtype), moved(KEY, second, dtype)][: SIGNATURES[op].arity]
        assert_bounded(apply(op, *args), exact=op in EXACT and dtype is not DType.UINT8)


@pytest.mark.parametrize(
    "op", [Op.FLOORDIV, Op.TRUNCDIV, Op.MOD, Op.FMOD, Op.POW, Op.SHR, Op.SHL, Op.AND], ids=lambda op: op.value
)
@pytest.mark.parametrize("number", [1, 2, 3, 5, 7, 20, -1, -3, -7])
def test_integers_and_a_number_have_exact_bounds(op: Op, number: int) -> None:
    if number < 0 and op in (Op.POW, Op.SHR, Op.SHL):
        return
    for beginning in (-6, 0, 3):
        # The low bits of a number are its remainder; of other bits the bounds are wider.
        exact = op is not Op.AND or number & (number + 1) == 0
        if op is Op.AND and not exact and number < 0:
            exact = False
        args = (
            moved(QUERY, beginning, DType.INT32),
            const(min(number, 5) if op in (Op.POW, Op.SHR, Op.SHL) else number, DType.INT32),
        )
        assert_bounded(apply(op, *args), exact and number > 0)


@pytest.mark.parametrize("op", FLOAT, ids=lambda op: op.value)
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16], ids=lambda d: d.value)
def test_floats_lie_in_their_bounds(op: Op, dtype: DType) -> None:
    for (first, second), step in itertools.product(SIGNED, (0.5, 1.7, 30.0)):
        scale = const(step, dtype, Kind.ELEMENT)
        args = [apply(Op.MUL, moved(n, at, dtype), scale) for n, at in ((QUERY, first), (KEY, second))]
        assert_bounded(apply(op, *args[: SIGNATURES[op].arity]), exact=False)
        if SIGNATURES[op].arity == 1:  # of nan too, and of infinities
            zero = apply(Op.MUL, args[1], const(0.0, dtype))
            with_nan = apply(Op.DIV, args[0], zero)
            assert_bounded(apply(op, with_nan), exact=False)


@pytest.mark.parametrize("op", [Op.LT, Op.LE, Op.EQ, Op.NE], ids=lambda op: op.value)
def test_comparisons_of_floats_know_nan(op: Op) -> None:
    for value in perhaps_nan():
        for other in (moved(KEY, -2, DType.FLOAT32), const(3.0, DType.FLOAT32), const(0.0, DType.FLOAT32)):
            assert_bounded(apply(op, value, other), exact=False)
            assert_bounded(apply(op, other, value), exact=False)


def perhaps_nan() -> list[Node]:
    """Floats that are infinite or nan; nan, or from 0 to 2; 0 or nan."""
    zero = apply(Op.MUL, moved(KEY, -2, DType.FLOAT32), const(0.0, DType.FLOAT32))
    infinite = apply(Op.DIV, moved(QUERY, -2, DType.FLOAT32), zero)
    rest = apply(Op.MOD, infinite, const(2.0, DType.FLOAT32))
    return [infinite, rest, apply(Op.MINIMUM, rest, const(0.0, DType.FLOAT32))]


@pytest.mark.parametrize("target", [DType.INT8, DType.INT32, DType.INT64, DType.BOOL], ids=lambda d: d.value)
def test_casts_know_nan(target: DType) -> None:
    for value in perhaps_nan():
        assert_bounded(cast(value, target), exact=False)


@pytest.mark.parametrize("op", [Op.AND, Op.OR, Op.XOR, Op.EQ, Op.NE, Op.LT, Op.LE], ids=lambda op: op.value)
def test_independent_predicates_have_exact_bounds(op: Op) -> None:
    one, two = (apply(Op.LT, index, const(3, DType.INT32)) for index in (QUERY, KEY))
    assert_bounded(apply(op, one, two), exact=True)
    assert_bounded(apply(Op.NOT, apply(op, one, two)), exact=True)


@pytest.mark.parametrize("source", [DType.INT32, DType.FLOAT32, DType.BOOL], ids=lambda d: d.value)
@pytest.mark.parametrize(
    "target", [DType.INT8, DType.UINT8, DType.INT64, DType.FLOAT16, DType.BOOL, DType.FLOAT64], ids=lambda d: d.value
)
def test_casts_lie_in_their_bounds(source: DType, target: DType) -> None:
    if source is DType.BOOL:
        value = apply(Op.LT, QUERY, KEY)
    else:
        value = apply(Op.MUL, moved(QUERY, -4, source), const(37 if source is DType.INT32 else 7.3, source))
    if source is DType.FLOAT32 and target is DType.UINT8:
        value = apply(Op.ABS, value)  # a negative float has no value as uint8
    assert_bounded(cast(value, target), exact=False)


def test_a_choice_lies_in_its_bounds() -> None:
    condition = apply(Op.LT, QUERY, KEY)
    branches = apply(Op.MUL, QUERY, const(3, DType.INT32)), apply(Op.SUB, KEY, const(20, DType.INT32))
    assert_bounded(apply(Op.WHERE, condition, *branches), exact=False)
    fixed = apply(Op.LT, QUERY, const(4, DType.INT32))
    assert_bounded(apply(Op.WHERE, fixed, *branches), exact=False)
    assert_bounded(apply(Op.WHERE, condition, apply(Op.LT, QUERY, const(2, DType.INT32)), fixed), exact=False)
