"""What a program captured, as the operators take it and as the backends do.

A run-time float is a number in an operator's list `floats`: part of the graph, but not of the kernel. A symbolic one, of
which the graph is to take any value, stands there as nan, and its 0-d tensor follows the captured tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .codegen.pipeline import Variant, variant


def split(captured: Sequence[Any], program: str) -> tuple[list[Tensor], list[float]]:
    """The tensors and the floats of an operator, of what a trace captured."""
    n = len(variant(program).captured)
    tensors, floats = list(captured[:n]), []
    for number in captured[n:]:
        symbolic = isinstance(number, Tensor)
        floats.append(math.nan if symbolic else number)
        if symbolic:
            tensors.append(number)
    return tensors, floats


def joined(tensors: Sequence[Tensor] | None, floats: Sequence[float] | None, parsed: Variant) -> Sequence[Any]:
    """What `split` was given. AOTInductor packages give None for an empty list."""
    if not floats:
        return tensors or ()
    assert tensors is not None or not parsed.captured
    n, given = len(parsed.captured), list(tensors or ())
    symbolic = iter(given[n:])
    return [*given[:n], *(next(symbolic) if math.isnan(number) else number for number in floats)]
