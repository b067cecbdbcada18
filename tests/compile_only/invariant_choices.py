"""Print what is chosen for batch-invariant calls of several sizes, and what the kernels that they launch compute, as JSON.

A list for each size, of a record for each kernel:

    pass          forward, dq or dkdv
    config        the configuration
    chosen by     a digest of the kernel that the choice was made with
    launched      a digest of the kernel that is compiled for the sizes
    arithmetic    a digest of the floating-point instructions of that kernel, in their order
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from typing import Any

import torch

from flexattn import Documents, create_block_mask, masks
from flexattn.backends import launch, triton
from flexattn.backends.collection import Collection
from flexattn.backends.invariant import OPTION
from flexattn.backends.one_pass import Backward, Sums
from flexattn.backends.target import compiling_for, named
from flexattn.batch_invariant import arranged
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace
from flexattn.problem import Problem

OPTIONS = {OPTION: True}
SIZES = (([100], 1), ([100, 300, 50], 3), ([5000, 16], 2))  # lengths of documents, and the batch
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
FLOATING = re.compile(r"\s*(?:@\S+ )?([\w.]+\.(?:f16|f16x2|bf16|bf16x2|f32)\b[\w.]*)")


def alibi(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score + SLOPES[h] * (kv_idx - q_idx)


def calls(lengths: list[int], B: int) -> list[launch.Call]:
    packed = Documents.from_lengths(lengths)
    q, k, v = (torch.empty(B, heads, sum(lengths), 128, dtype=torch.bfloat16) for heads in (4, 2, 2))
    made = arranged(q, k, v, alibi, masks.sliding_window(300), None, packed)
    assert made.layout is not None and made.mask_mod is not None
    length = made.layout.length
    blocks = create_block_mask(made.mask_mod, B, None, length, length, device="cpu").kv_lists()
    program, captured, ints = trace(made.score_mod, made.mask_mod)
    operands = tuple(t.contiguous() for t in made[:3])
    problem = Problem(*operands, captured, blocks, ints, (128, 128), variant(program), 0.1)
    row, gradients = torch.empty(B, 4, length), Backward(*operands, [])
    collection = Collection(problem, [], deterministic=True, invariant=True)
    given = operands[0], row, row, gradients, collection, OPTIONS
    return [
        triton.forward_call(problem, triton.Forward(operands[0], row, row), OPTIONS),
        triton.dq_call(problem, *given),
        triton.dkdv_call(problem, *given, Sums.of(problem, False, OPTIONS)),
    ]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def record(call: launch.Call, target: Any) -> dict[str, str]:
    launch._CHOSEN.clear()
    chosen = launch.choose(call, target)
    kernel = launch.compiled(call._replace(invariant=False), chosen.config)
    ptx = kernel.asm["ptx"]
    return {
        "pass": call.which,
        "config": str(chosen.config),
        "chosen by": chosen.kernel.hash,
        "launched": kernel.hash,
        "arithmetic": digest("\n".join(m[1] for m in map(FLOATING.match, ptx.splitlines()) if m)),
    }


if __name__ == "__main__":
    target = named(sys.argv[1])
    with compiling_for(target):
        print(json.dumps([[record(call, target) for call in calls(*size)] for size in SIZES]))
