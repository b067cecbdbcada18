"""The compiler's table of contents: from a program text to everything that is derived from it.

    text --parse--> graphs --simplify--> graphs --derivative--> gradient graphs

A `Variant` is built once per text and cached; nothing in it refers to tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from . import spec
from .derivative import Derivative, derivative
from .ir import DType, Node, Op, walk
from .program import parse
from .simplify import simplify


@dataclass(frozen=True)
class Variant:
    """One attention variant: its graphs after simplification, and the signature of what it captured.

    Where the raw score is multiplied by a run-time float before anything else, `scale` is the number of that float, and
    `unscaled` the score without it; backends scale the product of query and key once.
    """

    text: str
    score: Node
    mask: Node | None
    score_dtype: DType
    captured: tuple[tuple[DType, int], ...]
    n_floats: int
    n_ints: int
    unscaled: Node
    scale: int | None

    @property
    def modifies_score(self) -> bool:
        """Whether there is more to do than to scale the product."""
        return self.unscaled.op is not Op.INPUT

    @cached_property
    def gathers(self) -> bool:
        """Whether every element of a tile reads a captured tensor at a place of its own, which takes many registers."""
        roots = (self.score,) if self.mask is None else (self.score, self.mask)
        return any(n.op is Op.LOAD and {"q_idx", "kv_idx"} <= n.axes for n in walk(*roots))

    @cached_property
    def doubles(self) -> frozenset[object]:
        """The numbers of the run-time floats that are read as float64."""
        roots = (self.score,) if self.mask is None else (self.score, self.mask)
        return frozenset(n.value for n in walk(*roots) if n.op is Op.FLOAT and n.dtype is DType.FLOAT64)

    @cached_property
    def derivative(self) -> Derivative:
        """The gradients of `unscaled`."""
        result = derivative(self.unscaled)
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
    signature = parsed.score_dtype, parsed.captured, parsed.n_floats, parsed.n_ints
    return Variant(text, score, mask, *signature, *_without_scale(score))


def _without_scale(score: Node) -> tuple[Node, int | None]:
    """The graph without a factor that the raw score has wherever it is used, and the run-time float that it is."""
    users = [n for n in walk(score) for a in n.args if a.op is Op.INPUT and a.value == "score"]
    if not users or len(set(users)) != 1 or users[0].op is not Op.MUL:
        return score, None
    raw, factor = users[0].args if users[0].lhs.op is Op.INPUT else reversed(users[0].args)
    number = factor.args[0] if factor.op is Op.CAST else factor
    if number.op is not Op.FLOAT or not number.dtype is factor.dtype is raw.dtype:
        return score, None
    (score,) = simplify(spec.substitute([score], {users[0]: raw}))
    assert isinstance(number.value, int)
    return score, number.value
