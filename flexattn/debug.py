"""Debug mode: indices of captured tensors are checked element by element, where the mask attends.

Without it an index out of range reads the nearest element that exists, which is what a kernel can afford.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .backends.tiled import Walk
from .codegen.evaluate import Inputs, evaluate
from .codegen.formula import inline
from .codegen.ir import Node, Op, walk
from .problem import Problem

_ENABLED: ContextVar[bool] = ContextVar(
    "flexattn_debug", default=os.environ.get("FLEXATTN_DEBUG", "0") not in ("0", "")
)


@contextmanager
def debug_mode(enabled: bool = True) -> Iterator[None]:
    """Check every index of a captured tensor inside the `with`; also switched on by the environment: FLEXATTN_DEBUG=1.

    Raises `IndexError` from the attention call for the first index out of range at an element that is attended. Costs
    about as much as another forward pass.

    Example:
        >>> import torch, flexattn
        >>> q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))
        >>> short = torch.zeros(3)
        >>> with flexattn.debug_mode():
        ...     flexattn.flex_attention(q, k, v, score_mod=lambda score, b, h, q_idx, kv_idx: score + short[q_idx])
        Traceback (most recent call last):
        IndexError: index 3 is out of range for dimension 0 (size 3) of captured tensor c0, read as c0[q_idx] at b=0, \
h=0, q_idx=3, kv_idx=0
    """
    token = _ENABLED.set(enabled)
    try:
        yield
    finally:
        _ENABLED.reset(token)


def debugging() -> bool:
    """Whether debug mode is on."""
    return _ENABLED.get()


def check_indices(problem: Problem) -> None:
    """Raise `IndexError` for an index out of range at an attended element."""
    roots = [problem.variant.score] + ([] if problem.variant.mask is None else [problem.variant.mask])
    walker = Walk(problem)
    for load in (n for n in walk(*roots) if n.op is Op.LOAD and len(n.args) > 1):
        in_mask = problem.variant.mask is not None and load in set(walk(problem.variant.mask))
        for leg in walker.legs():
            for part in walker.parts(leg):
                for tile in leg.group.tiles:
                    for chunk in walker.chunks(part, tile):
                        keep = torch.ones((1, 1, 1, 1, chunk.width), dtype=torch.bool, device=walker.device)
                        if not in_mask:
                            for start, stop, inside in chunk.keep:
                                if keep.shape != torch.broadcast_shapes(keep.shape, inside.shape[:-1] + (1,)):
                                    shape = torch.broadcast_shapes(keep.shape[:-1], inside.shape[:-1])
                                    keep = keep.expand(*shape, chunk.width).clone()
                                keep[..., start:stop] &= inside
                        score = torch.zeros((), dtype=walker.dtype, device=walker.device)
                        _check(load, problem, chunk.inputs.fork({"score": score}), keep)


def _check(load: Node, problem: Problem, inputs: Inputs, keep: Tensor) -> None:
    base, *index = load.args
    assert isinstance(base.value, tuple)
    sizes = problem.captured[base.value[0]].shape
    for dim, (value, size) in enumerate(zip(evaluate(index, inputs), sizes, strict=True)):
        wrong = ((value < -size) | (value >= size)) & keep
        if not bool(wrong.any()):
            continue
        place = wrong.nonzero()[0].tolist()
        place = [0] * (5 - len(place)) + place
        named = inputs.named
        at = {}
        for name in ("b", "h", "q_idx", "kv_idx"):
            t = named[name]
            t = t.view([1] * (5 - t.dim()) + list(t.shape))
            at[name] = int(t[tuple(i if n > 1 else 0 for i, n in zip(place, t.shape, strict=True))])
        wide = value.view([1] * (5 - value.dim()) + list(value.shape))
        found = int(wide[tuple(i if n > 1 else 0 for i, n in zip(place, wide.shape, strict=True))])
        text = inline(load)
        raise IndexError(
            f"index {found} is out of range for dimension {dim} (size {size}) of captured tensor c{base.value[0]}, read as "
            f"{text} at " + ", ".join(f"{k}={v}" for k, v in at.items())
        )
