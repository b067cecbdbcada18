"""What the kernels of a variant become on a device: template, configuration, registers, spills, shared memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ..codegen.access import usual_methods
from ..codegen.pipeline import Variant
from ..kernel_options import options_of
from ..problem import Problem
from . import hopper
from .collection import Collection, is_deterministic
from .launch import Call, choose
from .one_pass import Backward, Sums, can_be_one_pass, in_one_pass_or_two
from .resources import Resources
from .target import Target, compiling_for, current
from .triton import Forward, dkdv_call, dq_call, forward_call

NOTHING: Mapping[str, Any] = MappingProxyType({})
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
    options: Mapping[str, Any] = NOTHING,
) -> list[Compiled]:
    """The kernels of a variant, compiled for `target` or the current device; nothing is run, so nothing is timed.

    The forward, then those of the backward, which has one pass or two, or `both_ways` where one is preferred. Gradients are
    asked for of the captured tensors that require them. `options`: what a caller pins, checked.
    """
    found = []
    options = {name: value for name, value in options.items() if "AUTOTUNE" not in name}
    with nullcontext() if target is None else compiling_for(target):
        device = "cuda" if target is None else "cpu"
        problem, collection = _asked(variant, captured, ints, dtype, head_dim, device, options)
        one, *_ = in_one_pass_or_two(problem, collection.methods, options, target or current())
        possible = [hopper.chosen(_forward(problem, options), problem, options, target)]
        possible += _backward(problem, collection, options, in_one_pass=False) if both_ways or not one else []
        possible += _backward(problem, collection, options, in_one_pass=True) if one else []
        for call in possible:
            start = time.perf_counter()
            chosen = choose(call, target)
            c, shaped = chosen.config, call.shaped(chosen.config)
            shape = shaped["shape"]
            tile = f"BLOCK_M={shape.BLOCK_M.value}, BLOCK_N={shape.BLOCK_N.value}"
            words = f"{tile}, num_warps={c.num_warps}, num_stages={c.num_stages}, {PRODUCTS[call.product]}"
            switches = {"by TMA": call.key[0] == "hopper" or shaped["k_tma"] is not None}
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
    problem, collection = _asked(variant, captured, ints, dtype, head_dim, device, NOTHING)
    found = [_forward(problem, NOTHING), *_backward(problem, collection, NOTHING, in_one_pass=False)]
    if can_be_one_pass(problem, collection.methods):
        found += _backward(problem, collection, NOTHING, in_one_pass=True)
    return found


def _asked(
    variant: Variant,
    captured: Sequence[Any],
    ints: Sequence[int],
    dtype: torch.dtype,
    head_dim: int,
    device: str,
    options: Mapping[str, Any],
) -> tuple[Problem, Collection]:
    """An attention of ordinary size, and how the gradients of its captured tensors are collected."""
    q, k, v = (torch.empty(1, HEADS, LENGTH, head_dim, dtype=dtype, device=device) for _ in range(3))
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
    repeatable = is_deterministic(options_of(options, forward=False))
    methods = usual_methods(variant.derivative.loads, wanted, repeatable)
    return problem, Collection(problem, wanted, methods=methods)


def _row(problem: Problem) -> torch.Tensor:
    return torch.empty(problem.query.shape[:-1], device=problem.query.device)


def _forward(problem: Problem, options: Mapping[str, Any]) -> Call:
    return forward_call(problem, Forward(problem.query, _row(problem), _row(problem)), options)


def _backward(problem: Problem, collection: Collection, options: Mapping[str, Any], in_one_pass: bool) -> list[Call]:
    row, gradients = _row(problem), Backward(problem.query, problem.key, problem.value, [])
    operands = (problem, problem.query, row, row, gradients, collection, options)
    if in_one_pass:
        sums = Sums.of(problem, True, options_of(options, forward=False))
        return [dkdv_call(*operands, sums)]
    return [dq_call(*operands), dkdv_call(*operands)]
