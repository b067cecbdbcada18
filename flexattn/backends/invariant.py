"""Batch invariance of the backends: whether a call asks for it, and operands of one form.

A processor's products and sums round by shapes, strides and addresses; which kernel is taken depends on them as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem

OPTION = "BATCH_INVARIANT"
ALIGNMENT = 16  # bytes, for which Triton compiles a kernel of its own


def is_invariant(options: Mapping[str, Any]) -> bool:
    """Whether checked options ask for it."""
    return bool(options.get(OPTION))


def canonical(t: Tensor) -> Tensor:
    """The tensor with the strides and the alignment of a new one."""
    size, strides = 1, []
    for n in reversed(t.shape):
        strides.append(size)
        size *= max(1, n)
    if t.stride() == tuple(reversed(strides)) and t.data_ptr() % ALIGNMENT == 0:
        return t
    return torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t)


def by_one_form(t: Tensor) -> bool:
    """Whether rows of any length are at multiples of the alignment, in a canonical tensor."""
    return t.shape[-1] * t.element_size() % ALIGNMENT == 0


def canonical_problem(problem: Problem) -> Problem:
    """The problem with operands of one form."""
    query, key, value = map(canonical, (problem.query, problem.key, problem.value))
    tensors = [canonical(t) for t in problem.tensors]
    return problem._replace(query=query, key=key, value=value, captured=[*tensors, *problem.floats])
