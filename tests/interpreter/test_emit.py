"""Law 6: an emitted function, run by Triton's interpreter, computes what `evaluate` computes."""

from __future__ import annotations

import linecache
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from assertions import assert_same
from hypothesis import example, given, settings
from one_tile import TILE, B, H, L, S, arguments_of, inputs_of, named_inputs
from strategies import Mod, default_dtype, environment, inexact, integers, mask_mods, score_mods
from torch import Tensor

from flexattn.codegen.emit import functions
from flexattn.codegen.evaluate import EVALUATE, TORCH_DTYPE, Inputs, evaluate
from flexattn.codegen.ir import DType, Kind, Node, Op, const, input_node, walk
from flexattn.codegen.jit import jitted
from flexattn.codegen.pipeline import Variant, variant
from flexattn.codegen.spec import SIGNATURES, apply, load
from flexattn.codegen.trace import trace
from flexattn.codegen.triton_text import SPELLING, never_negative
from flexattn.templates.one_tile import apply_gradient, apply_mask_mod, apply_score_mod


@settings(max_examples=60)
@given(mod=score_mods())
def test_law_6_an_emitted_score_mod_and_its_derivative_equal_evaluate(mod: Mod) -> None:
    program, captured, _ = trace(mod.bind(environment()), None)
    v = variant(program)
    made = jitted(functions(v))
    score, grad = torch.randn(L, S), torch.randn(L, S)
    out = torch.full((L, S), float("nan"))
    packed = arguments_of(v, captured)
    if made.score_mod is not None:
        apply_score_mod[(1,)](out, score, B, H, packed, L, S, made.score_mod, TILE, TILE)
        (want,) = evaluate([v.unscaled], inputs_of(v, captured, score=score))
        assert_same(out, want.expand(L, S), program, ulps=32)
    if made.score_mod_grad is not None:
        apply_gradient[(1,)](out, grad, score, B, H, packed, L, S, made.score_mod_grad, TILE, TILE)
        root = v.derivative.score
        want = torch.zeros(()) if root is None else evaluate([root], inputs_of(v, captured, score=score, grad=grad))[0]
        assert_same(out, want.expand(L, S), program, ulps=64)


@settings(max_examples=30)
@given(mod=score_mods().map(inexact), default=st.sampled_from((torch.float64, torch.bfloat16, torch.float16)))
def test_law_6_under_every_default_dtype(mod: Mod, default: torch.dtype) -> None:
    f = mod.bind(environment())
    score, out = torch.randn(L, S), torch.full((L, S), float("nan"))
    with default_dtype(default):
        program, captured, _ = trace(f, None)
    v = variant(program)
    made = jitted(functions(v))
    if made.score_mod is not None:
        apply_score_mod[(1,)](out, score, B, H, arguments_of(v, captured), L, S, made.score_mod, TILE, TILE)
        (want,) = evaluate([v.unscaled], inputs_of(v, captured, score=score))
        assert_same(out, want.expand(L, S), program, ulps=32)
        if v.scale is None:
            index = [t.view(1, 1) if t.dim() == 0 else t for t in named_inputs().values()]
            expected = torch.as_tensor(f(score, *index), dtype=torch.float32)  # numbers are rounded to no default dtype
            assert_same(out, expected.expand(L, S), program, ulps=64)


@settings(max_examples=60)
@given(mask=mask_mods())
def test_law_6_an_emitted_mask_mod_equals_evaluate(mask: Mod) -> None:
    program, captured, _ = trace(None, mask.bind(environment()))
    v = variant(program)
    made = jitted(functions(v))
    if v.mask is None:
        assert made.mask_mod is None
        return
    out = torch.zeros(L, S, dtype=torch.bool)
    apply_mask_mod[(1,)](out, B, H, arguments_of(v, captured), L, S, made.mask_mod, TILE, TILE)
    (want,) = evaluate([v.mask], inputs_of(v, captured))
    assert torch.equal(out, want.expand(L, S)), program


@pytest.mark.parametrize("number", [0.7, 0.0, -0.0, 5e-324, -1.7e308, 1e-300])
def test_a_number_beside_float64_keeps_all_its_bits(number: float) -> None:
    """Triton takes a Python float as float32."""
    values = torch.full((S,), number, dtype=torch.float64)
    values[::2] = torch.nextafter(values[::2], torch.tensor(torch.inf, dtype=torch.float64))
    program, captured, _ = trace(None, lambda b, h, q, k: values[k] <= number)
    v = variant(program)
    packed = arguments_of(v, captured)
    assert isinstance(packed[-1], int)
    out = torch.zeros(L, S, dtype=torch.bool)
    apply_mask_mod[(1,)](out, B, H, packed, L, S, jitted(functions(v)).mask_mod, TILE, TILE)
    assert torch.equal(out, (torch.arange(S) % 2 == 1).expand(L, S))


# ---- every operation, on values that its formula might get wrong

INTEGERS = [-130, -9, -8, -7, -3, -2, -1, 0, 1, 2, 3, 5, 7, 8, 31, 120]
FLOATS = [-1e4, -88.0, -7.5, -2.5, -1.0, -0.5, -1e-3, -1e-9, 0.0, 1e-9, 1e-3, 0.3, 0.5, 1.0, 1.5, 2.5, 3.7, 40.0, 3e4]
FLOATS += [4194304.5, 4194305.0, 8388607.5, 8388609.0, -8388609.0, -4194305.5, 3e8]
SPECIAL = [float("nan"), float("inf"), -float("inf")]
DOMAIN = {
    Op.EXP: 80.0, Op.EXP2: 100.0, Op.EXPM1: 80.0, Op.SIN: 100.0, Op.COS: 100.0,
}  # fmt: skip
NONZERO = frozenset((Op.FLOORDIV, Op.TRUNCDIV, Op.MOD, Op.FMOD, Op.DIV))
SHIFTS = frozenset((Op.SHL, Op.SHR))
ROUNDED_FIRST = frozenset((Op.FLOORDIV, Op.TRUNCDIV))  # torch rounds the quotient of 16-bit floats before it truncates
EXACT = frozenset((Op.ROUND, Op.FLOOR, Op.CEIL, Op.TRUNC, Op.ABS, Op.NEG, Op.SIGN, Op.MAXIMUM, Op.MINIMUM))
TYPES = {
    "b": [DType.BOOL],
    "i": [DType.INT32, DType.INT64, DType.INT8, DType.INT16, DType.UINT8],
    "f": [DType.FLOAT32],
}
CASES = [
    (op, dtype)
    for op, signature in SIGNATURES.items()
    for letter in signature.accepts
    for dtype in [*TYPES[letter], *([DType.BFLOAT16, DType.FLOAT16] if letter == "f" and signature.arity == 2 else [])]
    if not (op in ROUNDED_FIRST and dtype in (DType.BFLOAT16, DType.FLOAT16))
] + [(op, DType.FLOAT64) for op in SIGNATURES if op in EXACT]


def values_of(op: Op, dtype: DType, second: bool) -> Tensor:
    if dtype is DType.BOOL:
        return torch.tensor([False, True])
    if dtype.is_int:
        limits = torch.iinfo(TORCH_DTYPE[dtype])
        values = [v for v in INTEGERS if limits.min <= v <= limits.max]
        if op in NONZERO and second:
            values = [v for v in values if v]
        if op is Op.POW:
            values = [v for v in (-40, -3, -1, 0, 1, 2, 3, 5, 31, 64, 65) if v >= limits.min] if second else values
        if op in SHIFTS and second:
            values = [0, 1, 3, 6, 200] if dtype is not DType.INT8 else [0, 1, 3, 6]
        return torch.tensor(values, dtype=TORCH_DTYPE[dtype])
    values = [v for v in FLOATS if abs(v) <= DOMAIN.get(op, 1e9)]
    if op in NONZERO and second:
        values = [*(v for v in values if abs(v) > 1e-2), *SPECIAL]
    if op is Op.POW:
        values = [-3.0, -1.5, -1.0, 0.0, 0.5, 2.0, 3.0, *SPECIAL] if second else [-2.0, -1.0, 0.0, 0.5, 1.0, 3.7]
    if op in (Op.MAXIMUM, Op.MINIMUM, Op.LT, Op.LE, Op.EQ, Op.NE, Op.ABS, Op.NEG, Op.EXP, Op.TANH, Op.SIGMOID):
        values = values + SPECIAL
    return torch.tensor(values, dtype=TORCH_DTYPE[dtype])


def table_of(op: Op, dtype: DType) -> tuple[Variant, list[Tensor]]:
    """A score that is `op` of c0[q_idx] (and c1[kv_idx]), cast to float32, and what to capture."""
    reads = [
        load(Node(Op.CAPTURED, (), dtype, Kind.ELEMENT, (i, 1)), input_node(axis, DType.INT32))
        for i, axis in zip(range(SIGNATURES[op].arity), ("q_idx", "kv_idx"), strict=False)
    ]
    root = Node(Op.CAST, (apply(op, *reads),), DType.FLOAT32, Kind.ELEMENT)
    captured = [values_of(op, dtype, bool(i)) for i in range(len(reads))]
    return Variant("", root, None, DType.FLOAT32, tuple((dtype, 1) for _ in reads), 0, 0, root, None), captured


def of_constant(value: float) -> Variant:
    root = const(value, DType.FLOAT32)
    return Variant("", root, None, DType.FLOAT32, (), 0, 0, root, None)


@pytest.mark.parametrize(("op", "dtype"), CASES, ids=lambda x: x.value)
def test_every_operation_computes_what_torch_computes(op: Op, dtype: DType) -> None:
    v, captured = table_of(op, dtype)
    rows, columns = len(captured[0]), len(captured[-1])
    index = {"q_idx": torch.arange(rows).view(-1, 1), "kv_idx": torch.arange(columns), "score": torch.zeros(())}
    (want,) = evaluate([v.unscaled], Inputs({k: t.int() if k != "score" else t for k, t in index.items()}, captured))
    out = torch.full((rows, columns), 77.0)
    made = jitted(functions(v)).score_mod
    apply_score_mod[(1,)](
        out, torch.zeros(rows, columns), 0, 0, arguments_of(v, captured), rows, columns, made, TILE, TILE
    )
    want = want.expand(rows, columns)
    if dtype.is_int or op in EXACT:
        torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
    elif dtype in (DType.BFLOAT16, DType.FLOAT16):  # one rounding, to nearest or (in the interpreter) towards zero
        torch.testing.assert_close(out, want, rtol=2**-7, atol=1e-6, equal_nan=True)
    else:
        torch.testing.assert_close(out, want, rtol=4e-6, atol=1e-12 if op is not Op.COS else 1e-6, equal_nan=True)


def test_every_operation_has_a_spelling() -> None:
    assert set(SPELLING) == set(EVALUATE) | {Op.DETACH}


# ---- the text

ALIBI = "lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx)"


def emitted(body: str, **options: Any) -> Any:
    return functions(variant(trace(eval(body, environment()), None).program), **options)


def test_the_text_is_the_same_for_closures_over_other_tensors() -> None:
    assert emitted(ALIBI) == emitted(ALIBI)
    assert jitted(emitted(ALIBI)).score_mod is jitted(emitted(ALIBI)).score_mod


def test_a_function_is_named_after_its_content() -> None:
    first, second = emitted(ALIBI).score_mod, emitted(ALIBI.replace("+", "-", 1)).score_mod
    assert first.name != second.name
    assert first.name.startswith("score_mod_")


def test_the_text_can_be_read_where_python_looks_for_source() -> None:
    function = emitted(ALIBI).score_mod
    jitted(emitted(ALIBI))
    linecache.checkcache()
    assert "".join(linecache.getlines(f"<flexattn {function.name}>")) == function.source


def test_a_tensor_with_more_elements_than_32_bits_count_is_indexed_by_64_bits() -> None:
    assert "to(tl.int64)" in emitted(ALIBI, wide=(0,)).score_mod.source
    assert "to(tl.int64)" not in emitted(ALIBI).score_mod.source


def test_a_constant_that_float32_does_not_hold_is_infinite() -> None:
    for value, text in ((1e39, 'float("inf")'), (-1e39, 'float("-inf")'), (3e38, "3e+38")):
        v = of_constant(value)
        assert text in functions(v).score_mod.source


def test_nan_passes_through_maximum_and_minimum_on_every_device() -> None:
    """The hardware's instructions return the other operand; the interpreter's numpy does not show that."""
    for name in ("maximum", "minimum"):
        source = emitted(f"lambda score, b, h, q_idx, kv_idx: torch.{name}(score, slopes[h])").score_mod.source
        assert f"tl.{name}(" in source and "propagate_nan=tl.PropagateNan.ALL" in source


def test_a_constant_score_has_the_shape_of_the_tile() -> None:
    v = of_constant(2.5)
    out = torch.zeros(L, S)
    apply_score_mod[(1,)](out, torch.randn(L, S), 0, 0, (), L, S, jitted(functions(v)).score_mod, TILE, TILE)
    assert bool((out == 2.5).all())


def test_an_index_out_of_range_reads_the_nearest_element_and_an_empty_tensor_reads_zero() -> None:
    short, none = torch.tensor([1.0, 2.0]), torch.zeros(0)
    program, captured, _ = trace(lambda s, b, h, q, k: short[q - 3] + none[k], None)
    v = variant(program)
    out = torch.zeros(L, S)
    packed = arguments_of(v, captured)
    apply_score_mod[(1,)](out, torch.randn(L, S), 0, 0, packed, L, S, jitted(functions(v)).score_mod, TILE, TILE)
    (want,) = evaluate([v.score], inputs_of(v, captured, score=torch.zeros(L, S)))
    assert torch.equal(out, want.expand(L, S))


# ---- what is known not to be negative takes a shorter path


def program_of(body: str) -> tuple[Variant, list[Tensor]]:
    env = environment()
    program, captured, _ = trace(None, lambda b, h, q_idx, kv_idx: eval(body, env | locals()) > 1)
    return variant(program), captured


@settings(max_examples=200)
@given(body=integers(3))
@example("torch.where(q_idx > 3, kv_idx, kv_idx - 9)")
@example("torch.where(q_idx > 3, kv_idx - 9, kv_idx)")
@example("torch.minimum(kv_idx - 9, q_idx)")
@example("torch.minimum(q_idx, kv_idx - 9)")
@example("torch.maximum(-q_idx - 2, -kv_idx - 1)")
@example("(kv_idx - 9) // 2")
@example("(q_idx + 1) // (-kv_idx - 1)")
@example("(q_idx + 1) % (-kv_idx - 2)")
@example("(kv_idx - 9) >> 1")
@example("(kv_idx - 9) & (q_idx - 15)")
@example("(kv_idx - 9) << 1")
@example("q_idx ^ (-kv_idx - 1)")
def test_what_is_called_never_negative_is_not(body: str) -> None:
    v, captured = program_of(body)
    if v.mask is None:
        return
    nodes = [n for n in walk(v.mask) if n.dtype.is_int and never_negative(n)]
    for node, value in zip(nodes, evaluate(nodes, inputs_of(v, captured)), strict=True):
        assert bool((value >= 0).all()), node


@pytest.mark.parametrize(
    "body",
    ["q_idx // (kv_idx + 0)", "kv_idx % (q_idx + 0)", "(q_idx - 9).clamp(min=0)", "torch.minimum(q_idx, kv_idx)",
     "(q_idx - kv_idx) % 4", "(q_idx - kv_idx) & 7", "q_idx >> 1", "torch.where(q_idx > 3, kv_idx, 0)"],
)  # fmt: skip
def test_what_is_known_not_to_be_negative(body: str) -> None:
    v, _ = program_of(body)
    assert v.mask is not None
    assert all(never_negative(n) for n in v.mask.args), v.mask


@pytest.mark.parametrize(
    ("source", "dtype", "known"),
    [(DType.UINT8, DType.INT8, False), (DType.UINT8, DType.INT16, True), (DType.INT64, DType.INT32, False),
     (DType.INT32, DType.INT64, True), (DType.BOOL, DType.INT8, True), (DType.INT8, DType.UINT8, True)],
)  # fmt: skip
def test_a_cast_that_drops_the_highest_bit_may_be_negative(source: DType, dtype: DType, known: bool) -> None:
    read = load(Node(Op.CAPTURED, (), source, Kind.ELEMENT, (0, 1)), input_node("q_idx", DType.INT32))
    positive = read if source in (DType.UINT8, DType.BOOL) else apply(Op.AND, read, const(127, source))
    assert never_negative(Node(Op.CAST, (positive,), dtype, Kind.ELEMENT)) is known


def test_a_shift_by_all_bits_is_not_the_machine_s() -> None:
    """PTX and LLVM disagree on what that gives; torch gives zero, or the sign."""
    for body, by_device in (
        ("(q_idx << 31)", False),
        ("(q_idx << 32)", True),
        ("(kv_idx >> 31)", False),
        ("(kv_idx >> 32)", True),
    ):
        v, _ = program_of(f"{body} - b - 2")
        source = functions(v).mask_mod.source
        assert ("device.shift" in source) is by_device, source
