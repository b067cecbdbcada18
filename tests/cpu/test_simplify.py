"""Single rules of `simplify`, where random mods rarely lead."""

from __future__ import annotations

import math

import pytest
import torch

from flexattn.codegen.evaluate import Inputs, evaluate
from flexattn.codegen.ir import DType, Node, Op, const, input_node
from flexattn.codegen.simplify import RULES, simplify
from flexattn.codegen.spec import SIGNATURES, apply

score = input_node("score", DType.FLOAT32)
q, kv = input_node("q_idx", DType.INT32), input_node("kv_idx", DType.INT32)
later = apply(Op.LT, q, kv)

SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.5, math.inf, -math.inf, math.nan]


def bits(node: Node, value: float) -> torch.Tensor:
    """The value of a float expression of the score, down to the sign of zero."""
    (result,) = evaluate([node], Inputs({"score": torch.tensor([value])}))
    return torch.stack([result.nan_to_num(9.0, 8.0, -8.0), torch.signbit(result).float()])


@pytest.mark.parametrize("constant", [0.0, -0.0, 1.0, -1.0, 2.0])
@pytest.mark.parametrize(
    "op", [o for o in RULES if o in SIGNATURES and "f" in SIGNATURES[o].accepts], ids=lambda o: o.value
)
def test_a_rule_holds_for_every_special_float(op: Op, constant: float) -> None:
    literal = const(constant, DType.FLOAT32)
    operands = [(score,)] if SIGNATURES[op].arity == 1 else [(score, literal), (literal, score), (score, score)]
    for pair in operands:
        node = apply(op, *pair)
        if node.dtype is DType.BOOL:
            node = apply(Op.WHERE, node, const(1.0, DType.FLOAT32), const(2.0, DType.FLOAT32))
        (simple,) = simplify([node])
        for value in SPECIAL:
            if math.isnan(value) and op in (Op.NEG, Op.ABS, Op.MUL, Op.SUB, Op.ADD, Op.DIV):
                assert bits(simple, value)[0] == bits(node, value)[0]  # the sign of nan means nothing
            else:
                assert torch.equal(bits(simple, value), bits(node, value)), (op, constant, value)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (apply(Op.ADD, q, const(0, DType.INT32)), q),
        (apply(Op.MUL, q, const(0, DType.INT32)), const(0, DType.INT32)),
        (apply(Op.SUB, q, q), const(0, DType.INT32)),
        (apply(Op.AND, later, const(True, DType.BOOL)), later),
        (apply(Op.OR, later, const(True, DType.BOOL)), const(True, DType.BOOL)),
        (apply(Op.AND, later, later), later),
        (apply(Op.NOT, apply(Op.NOT, later)), later),
        (apply(Op.NOT, later), apply(Op.LE, kv, q)),
        (apply(Op.WHERE, const(False, DType.BOOL), q, kv), kv),
        (
            apply(Op.WHERE, apply(Op.NOT, apply(Op.AND, later, later)), q, kv),
            apply(Op.WHERE, apply(Op.LE, kv, q), q, kv),
        ),
        (apply(Op.WHERE, later, q, q), q),
        (apply(Op.ADD, const(2**31 - 1, DType.INT32), const(1, DType.INT32)), const(-(2**31), DType.INT32)),
        (apply(Op.FLOORDIV, const(-7, DType.INT32), const(2, DType.INT32)), const(-4, DType.INT32)),
        (apply(Op.MOD, const(-7, DType.INT32), const(2, DType.INT32)), const(1, DType.INT32)),
        (apply(Op.LT, const(1, DType.INT32), const(2, DType.INT32)), const(True, DType.BOOL)),
    ],
    ids=repr,
)
def test_a_rule_gives_the_simpler_form(before: Node, after: Node) -> None:
    (simple,) = simplify([before])
    assert (simple.op, simple.args, simple.value) == (after.op, after.args, after.value)


def test_integer_division_by_a_literal_zero_is_left_to_the_run() -> None:
    node = apply(Op.FLOORDIV, const(1, DType.INT32), const(0, DType.INT32))
    assert simplify([node]) == [node]
