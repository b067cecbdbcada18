"""The compiler's table of contents: from a program text to everything that is derived from it.

    text --parse--> graphs --simplify--> graphs --derivative--> gradient graphs

A `Variant` is built once per text and cached; nothing in it refers to tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from . import spec
from .derivative import Derivative, derivative
from .ir import DType, Node, Op
from .program import parse
from .simplify import simplify


@dataclass(frozen=True)
class Variant:
    """One attention variant: its graphs after simplification, and the signature of what it captured."""

    text: str
    score: Node
    mask: Node | None
    score_dtype: DType
    captured: tuple[tuple[DType, int], ...]
    n_floats: int
    n_ints: int

    @property
    def modifies_score(self) -> bool:
        return self.score.op is not Op.INPUT

    @cached_property
    def derivative(self) -> Derivative:
        result = derivative(self.score)
        roots = [g for _, g in result.loads] + ([result.score] if result.score is not None else [])
        spec.check(roots, allow_grad=True)
        return result


@lru_cache(maxsize=1024)
def variant(text: str) -> Variant:
    """The variant of a program text. Raises `ProgramError` for a malformed one."""
    parsed = parse(text)
    roots = [parsed.score] if parsed.mask is None else [parsed.score, parsed.mask]
    score, *rest = simplify(roots)
    mask = rest[0] if rest else None
    if mask is not None and mask.is_const and mask.value is True:
        mask = None
    spec.check([score] if mask is None else [score, mask])
    return Variant(text, score, mask, parsed.score_dtype, parsed.captured, parsed.n_floats, parsed.n_ints)
