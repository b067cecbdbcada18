"""The promotion table is torch's: every operation, every pair of dtypes, every standing."""

from __future__ import annotations

import itertools

import pytest
import torch
from assertions import assert_same
from torch import Tensor

from flexattn.codegen.errors import TraceError
from flexattn.codegen.evaluate import IR_DTYPE, TORCH_DTYPE, Inputs, evaluate
from flexattn.codegen.ir import DType, Kind, Op
from flexattn.codegen.program import parse
from flexattn.codegen.promotion import build
from flexattn.codegen.recorder import Recorder
from flexattn.codegen.spec import check, load
from flexattn.codegen.trace import trace

DTYPES = [TORCH_DTYPE[d] for d in DType]
BINARY = {
    Op.ADD: torch.add,
    Op.SUB: torch.sub,
    Op.MUL: torch.mul,
    Op.DIV: torch.true_divide,
    Op.FLOORDIV: torch.floor_divide,
    Op.MOD: torch.remainder,
    Op.FMOD: torch.fmod,
    Op.MAXIMUM: torch.maximum,
    Op.LT: torch.lt,
    Op.EQ: torch.eq,
    Op.AND: torch.bitwise_and,
    Op.SHL: torch.bitwise_left_shift,
}


def values(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Small numbers of both signs, none of them zero."""
    numbers = torch.tensor([3, -2, 5, 1, -7, 4]) if dtype.is_signed else torch.tensor([3, 2, 5, 1, 7, 4])
    picked = numbers[: max(1, int(torch.tensor(shape).prod()))].to(dtype)
    return picked.view(shape) if shape else picked[0]


@pytest.mark.parametrize("op", BINARY, ids=lambda op: op.value)
def test_a_binary_operation_has_torchs_dtype_and_value(op: Op) -> None:
    function = BINARY[op]
    standings: list[tuple[int, ...]] = [(), (6,)]
    for (left, right), (a_shape, b_shape) in itertools.product(
        itertools.product(DTYPES, DTYPES), itertools.product(standings, standings)
    ):
        if a_shape == b_shape == ():
            continue  # nothing that touches no placeholder is traced
        a, b = values(left, a_shape), values(right, b_shape)
        if b.dim() == 1:
            b = b.roll(1)
        recorder = Recorder(torch.device("cpu"))
        index = recorder.scalar(_element())

        def operand(t: Tensor, recorder: Recorder = recorder, index: Tensor = index) -> object:
            return load(recorder._capture(t), *([index.content.nodes[0]] if t.dim() else []))  # type: ignore[attr-defined]

        try:
            expected = function(a, b)
        except (RuntimeError, NotImplementedError):
            with pytest.raises(TraceError):
                build(op, operand(a), operand(b))  # type: ignore[arg-type]
            continue
        try:
            node = build(op, operand(a), operand(b))  # type: ignore[arg-type]
        except TraceError:
            # Stricter than torch only where it shifts or subtracts booleans.
            assert torch.bool in (left, right) or op is Op.SHL, (op, left, right)
            continue
        check([node])
        (value,) = evaluate([node], Inputs({"q_idx": torch.arange(6)}, recorder.captured))
        low = {torch.float16, torch.bfloat16} & {value.dtype}
        assert_same(value, expected, f"{op.value} {left} {a_shape} {right} {b_shape}", ulps=2 if low else 0)


def _element() -> object:
    from flexattn.codegen.ir import input_node

    return input_node("q_idx", DType.INT32)


@pytest.mark.parametrize("number", [True, 3, 2.5])
@pytest.mark.parametrize("op", [Op.ADD, Op.MUL, Op.DIV, Op.MAXIMUM, Op.LT], ids=lambda op: op.value)
def test_a_python_number_is_weak(op: Op, number: float) -> None:
    for dtype in DTYPES:
        t = values(dtype, (6,))
        recorder = Recorder(torch.device("cpu"))
        element = load(recorder._capture(t), _element())  # type: ignore[arg-type]
        try:
            expected = BINARY[op](t, number) if op is not Op.MAXIMUM else torch.maximum(t, torch.tensor(number))
        except (RuntimeError, NotImplementedError):
            continue
        node = build(op, element, recorder.number(number))
        if op is Op.MAXIMUM and isinstance(number, float) and not dtype.is_floating_point:
            assert node.dtype is DType.FLOAT32
        else:
            assert node.dtype is IR_DTYPE[expected.dtype], (op, dtype, number)
        floats = [torch.tensor(number, dtype=torch.float64)]
        (value,) = evaluate([node], Inputs({"q_idx": torch.arange(6)}, recorder.captured, floats))
        assert_same(value, expected.to(value.dtype), ulps=2)


OPTIONS = {
    "add": lambda a, b: torch.add(a, b, alpha=3),
    "sub": lambda a, b: torch.sub(a, b, alpha=3),
    "addcmul": lambda a, b: torch.addcmul(a, b, b, value=2),
    "addcmul of another type": lambda a, b: torch.addcmul(a, a, b, value=2),
    "addcdiv": lambda a, b: torch.addcdiv(a, b, b, value=2),
    "clamp": lambda a, b: torch.clamp(a, max=b),
    "where": lambda a, b: torch.where(a > 2, a, b),
    "trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "floor": lambda a, b: torch.div(a, b, rounding_mode="floor"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_apply_in_the_type_of_the_result(name: str) -> None:
    computed = 0
    for left, right in itertools.product(DTYPES, DTYPES):
        a, b = (torch.tensor([100, 3, 90, 1, 60, 7]).to(dtype) for dtype in (left, right))
        try:
            expected = OPTIONS[name](a, b.roll(1))
        except (RuntimeError, NotImplementedError):
            continue
        try:
            mod = OPTIONS[name]
            traced = trace(lambda s, bb, h, q, k: mod(a[q], b.roll(1)[q]), None, score_dtype=torch.float64)
        except TraceError:
            assert torch.bool in (left, right)
            continue
        inputs = Inputs({"q_idx": torch.arange(6)}, [t for t in traced.captured if isinstance(t, Tensor)])
        (value,) = evaluate([parse(traced.program).score], inputs)  # type: ignore[list-item]
        low = {torch.float16, torch.bfloat16} & {expected.dtype}
        torch.testing.assert_close(value, expected.double(), rtol=2e-2 if low else 1e-7, atol=0, msg=f"{left} {right}")
        computed += 1
    assert computed > 8


def test_the_standing_of_a_result_is_that_of_its_strongest_operand() -> None:
    recorder = Recorder(torch.device("cpu"))
    scalar = load(recorder._capture(torch.tensor(2.0, dtype=torch.float64)))
    element = load(recorder._capture(torch.ones(3)), _element())  # type: ignore[arg-type]
    assert build(Op.ADD, scalar, element).dtype is DType.FLOAT32
    assert build(Op.ADD, scalar, element).kind is Kind.ELEMENT
    assert build(Op.ADD, scalar, recorder.number(3)).kind is Kind.SCALAR
