"""Compile a score_mod that uses every operation on every dtype, for the targets named; print what fails.

Run in a process of its own by test_compile.py: the tests themselves run Triton's interpreter.
"""

from __future__ import annotations

import sys

import torch

from flexattn.backends.launch import compiled
from flexattn.backends.survey import calls
from flexattn.backends.target import compiling_for, named
from flexattn.codegen.evaluate import TORCH_DTYPE
from flexattn.codegen.ir import DType, Kind, Node, Op, input_node
from flexattn.codegen.pipeline import Variant
from flexattn.codegen.spec import SIGNATURES, apply, letter, load
from flexattn.config import KernelConfig

SMALL = KernelConfig(16, 16, 4, 1)


def read(number: int, axis: str, dtype: DType) -> Node:
    return load(Node(Op.CAPTURED, (), dtype, Kind.ELEMENT, (number, 1)), input_node(axis, DType.INT32))


def mod(dtype: DType, ops: list[Op]) -> Variant:
    """The sum of all operations on c0[q_idx] and c1[kv_idx], so that none can be left out."""
    a, b = read(0, "q_idx", dtype), read(1, "kv_idx", dtype)
    total = input_node("score", DType.FLOAT32)
    for op in ops:
        value = apply(op, a, b) if SIGNATURES[op].arity == 2 else apply(op, a)
        total = apply(Op.ADD, total, Node(Op.CAST, (value,), DType.FLOAT32, Kind.ELEMENT))
    chosen = apply(Op.WHERE, Node(Op.CAST, (a,), DType.BOOL, Kind.ELEMENT), a, b)
    total = apply(Op.ADD, total, Node(Op.CAST, (chosen,), DType.FLOAT32, Kind.ELEMENT))
    return Variant("", total, None, DType.FLOAT32, ((dtype, 1), (dtype, 1)), 0, 0, total, None)


def failure(target_name: str, dtype: DType, ops: list[Op]) -> str:
    """Why the forward kernel with these operations does not compile; empty if it does."""
    target = named(target_name)
    captured = [torch.zeros(8, dtype=TORCH_DTYPE[dtype]) for _ in range(2)]
    with compiling_for(target):
        call = calls(mod(dtype, ops), captured, [], torch.bfloat16, 16, "cpu")[0]
        try:
            compiled(call, SMALL)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def main() -> int:
    failures = 0
    for target in sys.argv[1:]:
        for dtype in DType:
            ops = [op for op, signature in SIGNATURES.items() if letter(dtype) in signature.accepts]
            if failure(target, dtype, ops):
                for op in ops:
                    why = failure(target, dtype, [op])
                    failures += bool(why)
                    print(f"{target} {op.value} of {dtype.value}: {why or 'compiles alone'}", flush=True)
            else:
                print(f"{target} {dtype.value}: {len(ops)} operations compile", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
