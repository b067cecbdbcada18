"""What the kernels of a variant become on a device: template, configuration, registers, spills, shared memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from ..codegen.access import usual_methods
from ..codegen.pipeline import Variant
from ..config import prefers_one_pass
from ..problem import Problem
from .collection import Collection
from .launch import Call, choose
from .one_pass import Backward, Sums, can_be_one_pass
from .resources import Resources
from .target import Target, compiling_for, current
from .triton import Forward, dkdv_call, dq_call, forward_call

HEADS, LENGTH = 8, 4096
ONE_PASS = {"one_pass": ("dQ in the same pass, added in any order",)}
PRODUCTS = {"half": "16-bit products", "tf32": "TF32 products", "ieee": "float32 products"}


class Compiled(NamedTuple):
    """One kernel: its template's name and pass, its configuration in words, what it needs, the seconds it took to get it."""

    template: str
    which: str
    config: str
    resources: Resources
    seconds: float
    kernel: Any

    def __str__(self) -> str:
        return f"{self.template}: {self.config}; {self.resources}"


def survey(
    variant: Variant,
    captured: Sequence[Any],
    ints: Sequence[int],
    dtype: torch.dtype,
    head_dim: int,
    target: Target | None,
    both_ways: bool = False,
) -> list[Compiled]:
    """The kernels of a variant, compiled for `target` or the current device; nothing is run.

    The forward, then those of the backward, which has one pass or two, or `both_ways`. Gradients are asked for of the
    captured tensors that require them.
    """
    found = []
    with nullcontext() if target is None else compiling_for(target):
        possible = calls(variant, captured, ints, dtype, head_dim, "cuda" if target is None else "cpu")
        last = possible[-1]
        if last.which == "one_pass":
            device = target or current()
            if not prefers_one_pass(device.backend, device.arch, last.product, last.head_dim):
                possible.remove(last)
            elif not both_ways:
                possible = [possible[0], last]
        for call in possible:
            start = time.perf_counter()
            chosen = choose(call, target)
            c, shaped = chosen.config, call.shaped(chosen.config)
            shape = shaped["shape"]
            tile = f"BLOCK_M={shape.BLOCK_M.value}, BLOCK_N={shape.BLOCK_N.value}"
            words = f"{tile}, num_warps={c.num_warps}, num_stages={c.num_stages}, {PRODUCTS[call.product]}"
            switches = {"by TMA": "k_tma" in shaped and shaped["k_tma"] is not None}
            switches |= {"values a tile late": shape.OVERLAP.value, "queries as rows": shape.UPRIGHT.value}
            words = ", ".join([words, *(name for name, on in switches.items() if on), *ONE_PASS.get(call.which, ())])
            name = call.kernel.fn.__name__
            found.append(
                Compiled(name, call.which, words, chosen.resources, time.perf_counter() - start, chosen.kernel)
            )
    return found


def calls(
    variant: Variant, captured: Sequence[Any], ints: Sequence[int], dtype: torch.dtype, head_dim: int, device: str
) -> list[Call]:
    """The calls of an attention of ordinary size, with block lists if there is a mask: the forward, the two passes of a
    backward, and that of a backward in one pass, if it is possible.

    `captured`: as in `Problem`, run-time floats included.
    """
    q, k, v = (torch.empty(1, HEADS, LENGTH, head_dim, dtype=dtype, device=device) for _ in range(3))
    row = torch.empty(1, HEADS, LENGTH, device=device)
    blocks = LENGTH // 128
    lists = []
    if variant.mask is not None:
        count, index = torch.zeros(1, 1, blocks, dtype=torch.int32, device=device), torch.zeros(1, 1, blocks, blocks)
        lists = [count, index.to(count)] * 2
    n = len(variant.captured)  # run-time floats come after the tensors
    wanted = [i for i, t in enumerate(captured[:n]) if t.requires_grad]
    captured = [*(t.detach().to(device) for t in captured[:n]), *captured[n:]]
    problem = Problem(q, k, v, captured, lists, ints, (128, 128), variant, head_dim**-0.5)
    # The tensors at hand may be of another length than this problem.
    collection = Collection(problem, wanted, methods=usual_methods(variant.derivative.loads, wanted))
    gradients = Backward(q, k, v, [])
    found = [
        forward_call(problem, Forward(q, row, row), {}),
        dq_call(problem, q, row, row, gradients, collection, {}),
        dkdv_call(problem, q, row, row, gradients, collection, {}),
    ]
    if can_be_one_pass(problem, collection.methods):
        sums = Sums.of(problem, True, {})
        found.append(dkdv_call(problem, q, row, row, gradients, collection, {}, sums))
    return found
