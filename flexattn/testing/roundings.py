"""What rounding can make of a score_mod: its values and slopes on raw scores that are known up to an error.

In: a problem, exact raw scores and their errors. Out: an interval for every modified score, and for every derivative its exact
value with an error. The intervals hold the values of a few evaluations in which each operation is off by a rounding, up or down
at random: Monte Carlo arithmetic (Parker, Pierce and Eggert, "Monte Carlo arithmetic: how to gamble with floating point and
win", 2000). So a mod that amplifies errors, cancels, or jumps (`where`, `floor`, an index made of a score) is allowed what it
really does to them, element by element, and any other mod no more than its roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..codegen.evaluate import TORCH_DTYPE, Inputs, evaluate
from ..codegen.ir import Node, Op, walk
from ..problem import Problem

DRAWS = 6
# Roundings of an operation, in units of eps of its dtype; what is not listed is exact.
ROUNDINGS: dict[Op, float] = {
    **dict.fromkeys((Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.MOD, Op.FMOD, Op.SQRT, Op.FLOAT, Op.CAST), 1.0),
    **dict.fromkeys((Op.POW, Op.EXP, Op.EXP2, Op.EXPM1, Op.LOG, Op.LOG2, Op.LOG1P, Op.RSQRT), 4.0),
    **dict.fromkeys((Op.SIN, Op.COS, Op.ATAN, Op.TANH, Op.SIGMOID, Op.ERF), 4.0),
}


class Slope(NamedTuple):
    """The derivative of a modified score in each element [B, Hq, L, S]: its value, and how far it may be off."""

    value: Tensor
    error: Tensor


class Modified(NamedTuple):
    """Modified scores [B, Hq, L, S], -inf where masked, between `low` and `high`; slopes, 0 where masked.

    `loads` holds for each read of a captured floating-point tensor its number, the indices of the element that is read, and
    the slope by it.
    """

    score: Tensor
    low: Tensor
    high: Tensor
    slope: Slope
    loads: list[tuple[int, list[Tensor], Slope]]


class _Values(NamedTuple):
    score: Tensor
    slopes: list[Tensor]


def modified(
    problem: Problem,
    exact: Tensor,
    raw: Tensor,
    error: Tensor,
    keep: Tensor,
    inputs: Inputs,
    wanted: Sequence[int] = (),
    roundings: Mapping[Op, float] | None = None,
    draws: int = DRAWS,
) -> Modified:
    """What `problem`'s mod may make of the `raw` scores (times `problem.scale`), float64, which are off by up to `error`.

    `exact` are the modified scores in float64, `keep` is the mask, `inputs` the indices and captured tensors. `wanted` are the
    numbers of the captured tensors whose slopes are asked for.
    """
    variant, rules = problem.variant, ROUNDINGS | dict(roundings or {})
    derivative = variant.derivative
    loads = [(n, g) for n, g in derivative.loads if _number(n) in wanted]
    roots = [variant.unscaled] + ([derivative.score] if derivative.score is not None else []) + [g for _, g in loads]
    generator = torch.Generator(raw.device).manual_seed(0)
    shape = raw.shape

    def values(score: Tensor, rounded: Callable[[Node, Tensor], Tensor]) -> _Values:
        given = {**inputs.named, "score": score, "grad": torch.ones_like(score)}
        first, *rest = _evaluated(
            roots, Inputs(given, inputs.captured, inputs.floats, inputs.ints, inputs.device), rounded
        )
        masked = first.expand(shape).masked_fill(~keep, float("-inf"))
        return _Values(masked, [s.expand(shape).masked_fill(~keep, 0.0) for s in rest])

    def drawn() -> Iterator[_Values]:
        yield values(raw - error, _unrounded)
        yield values(raw + error, _unrounded)
        for _ in range(draws):
            yield values(raw + error * _signs(raw, generator), lambda n, x: _off(n, x, rules, generator))

    score = exact.masked_fill(~keep, float("-inf"))
    middle = values(raw, _unrounded)
    low, high = torch.minimum(score, middle.score), torch.maximum(score, middle.score)
    errors = [torch.zeros_like(s) for s in middle.slopes]
    for draw in drawn():
        # nan, as of the root of a number that rounds to below zero, makes the interval nan: nothing is known then.
        low, high = torch.minimum(low, draw.score), torch.maximum(high, draw.score)
        errors = [torch.maximum(e, _distance(s, m)) for e, s, m in zip(errors, draw.slopes, middle.slopes, strict=True)]
    slopes = [Slope(m, e) for m, e in zip(middle.slopes, errors, strict=True)]
    nothing = Slope(torch.zeros_like(raw), torch.zeros_like(raw))
    to_score = slopes.pop(0) if derivative.score is not None else nothing
    places = [evaluate(n.args[1:], inputs.fork({"score": raw})) for n, _ in loads]
    numbers = [_number(n) for n, _ in loads]
    return Modified(score, low, high, to_score, list(zip(numbers, places, slopes, strict=True)))


def _number(load: Node) -> int:
    """The number of the captured tensor that is read."""
    assert isinstance(load.args[0].value, tuple)
    return load.args[0].value[0]


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a == b, 0.0, (a - b).abs())  # also of infinities


def _evaluated(roots: Sequence[Node], inputs: Inputs, rounded: Callable[[Node, Tensor], Tensor]) -> list[Tensor]:
    """The values of `roots` in float64, whatever their dtypes; `rounded` sees the value of each node."""
    memo = inputs.memo
    for node in walk(*roots):
        if node.op is Op.CAPTURED:
            continue
        if not node.dtype.is_float:
            evaluate([node], inputs)
            continue
        if node.op is Op.INPUT:
            memo[node] = inputs.named[str(node.value)]
        elif node.op is Op.CAST and node.args[0].dtype.is_float:
            memo[node] = rounded(node, memo[node.args[0]])
        else:
            memo[node] = rounded(node, evaluate([node], inputs)[0].double())
    return [memo[n] for n in roots]


def _unrounded(node: Node, value: Tensor) -> Tensor:
    return value


def _off(node: Node, value: Tensor, rules: Mapping[Op, float], generator: torch.Generator) -> Tensor:
    """`value` off by the roundings of its operation."""
    amount = rules.get(node.op, 0.0)
    if node.op is Op.CAST and not _narrows(node):
        amount = 0.0
    if not amount:
        return value
    return value * (1 + amount * torch.finfo(TORCH_DTYPE[node.dtype]).eps * _signs(value, generator))


def _narrows(cast: Node) -> bool:
    """Whether a cast rounds; to float32 and more, integers of the size of an index are exact."""
    source, target = TORCH_DTYPE[cast.args[0].dtype], TORCH_DTYPE[cast.dtype]
    if not source.is_floating_point:
        return target.itemsize < 4
    return torch.finfo(source).eps < torch.finfo(target).eps


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device).bernoulli_(0.5, generator=generator) * 2 - 1
