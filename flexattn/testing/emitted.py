"""Emitted Triton functions, run on one tile by Triton's interpreter. In: a traced mod. Out: what each function computed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..codegen.ir import Node, const
from .traced import LawNotRun, Traced


class Result(NamedTuple):
    """What one function gave for the tile of one head, [1, 1, L, S], and the graph it was emitted from.

    `ulps`: how many roundings of the largest value on the way it may be off; Triton's elementary functions are not torch's.
    """

    role: str
    root: Node
    at: tuple[int, int]
    value: Tensor
    score: Tensor
    grad: Tensor
    ulps: float


def run(traced: Traced, tile: int) -> Iterator[Result]:
    """Run the functions emitted for a variant for the last head of the last batch entry.

    Raises `LawNotRun` where Triton or its interpreter is missing.
    """
    if importlib.util.find_spec("triton") is None:
        raise LawNotRun("needs Triton, which is for Linux")
    if importlib.util.find_spec("numpy") is None:
        raise LawNotRun("needs Triton's interpreter, which needs numpy: pip install numpy")
    from ..backends.target import interpreted

    if not interpreted():
        raise LawNotRun("needs Triton's interpreter: set TRITON_INTERPRET=1 before Python starts")
    from ..backends.triton import captured_arguments
    from ..codegen.emit import functions
    from ..codegen.jit import jitted
    from ..templates.one_tile import apply_gradient, apply_mask_mod, apply_score_mod

    B, H, L, S = traced.shape
    at = b, h = B - 1, H - 1
    v = traced.variant
    made = jitted(functions(v))
    n = len(traced.tensors)
    cpu = [t.detach().cpu() for t in traced.tensors]
    captured = captured_arguments(v, cpu, traced.captured[n:], traced.ints, torch.device("cpu"))
    score, grad = traced.score(), traced.score(seed=1)
    tiles = [t.cpu()[b, h].contiguous() for t in (score, grad)]
    last = b, h, captured, L, S

    def result(role: str, root: Node, value: Tensor, ulps: float) -> Result:
        return Result(role, root, at, value.view(1, 1, L, S), score, grad, ulps)

    if made.score_mod is not None:
        out = torch.full((L, S), torch.nan)
        apply_score_mod[(1,)](out, tiles[0], *last, made.score_mod, tile, tile)
        yield result("score_mod", v.unscaled, out, 32)
    if made.score_mod_grad is not None:
        out = torch.full((L, S), torch.nan)
        apply_gradient[(1,)](out, tiles[1], tiles[0], *last, made.score_mod_grad, tile, tile)
        root = v.derivative.score
        yield result("derivative of score_mod", const(0.0, v.score_dtype) if root is None else root, out, 64)
    if made.mask_mod is not None:
        assert v.mask is not None
        kept = torch.zeros(L, S, dtype=torch.bool)
        apply_mask_mod[(1,)](kept, *last, made.mask_mod, tile, tile)
        yield result("mask_mod", v.mask, kept, 0)
