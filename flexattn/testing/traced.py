"""A mod as the compiler sees it, on index ranges that its captured tensors reach. In: mods. Out: graphs, inputs, sizes."""

from __future__ import annotations

import unittest
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..codegen.evaluate import Inputs, evaluate
from ..codegen.ir import INDEX_INPUTS, Node, Op, walk
from ..codegen.pipeline import Variant, variant
from ..codegen.program import Parsed, parse
from ..codegen.trace import trace

Mod = Callable[..., Any]


class LawNotRun(unittest.SkipTest):
    """A law that says nothing about a mod, or could not be examined here, and why. Test runners report it as a skip."""


class Traced(NamedTuple):
    """A traced variant, and how far its indices may go.

    `sizes`: of b, h, q_idx and kv_idx, all from 0 on, so that nothing is read beyond a captured tensor.
    """

    program: str
    captured: list[Any]
    ints: list[Any]
    device: torch.device
    sizes: Mapping[str, int]

    @property
    def parsed(self) -> Parsed:
        """Its graphs as they were traced."""
        return parse(self.program)

    @property
    def variant(self) -> Variant:
        """Its graphs as they are compiled."""
        return variant(self.program)

    @property
    def tensors(self) -> list[Tensor]:
        """The captured tensors, without the run-time floats."""
        return self.captured[: len(self.captured) - self.variant.n_floats]

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes in order: B, H, L, S."""
        return tuple(self.sizes[name] for name in INDEX_INPUTS)

    def score(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Scores of a normal distribution, [B, H, L, S], the same each time."""
        g = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape, generator=g, dtype=torch.float64).to(self.device, dtype)

    def inputs(self, **named: Tensor) -> Inputs:
        """What its graphs are evaluated on: every index of the ranges, and values by name."""
        return _inputs(self, self.sizes, named)

    @classmethod
    def of(
        cls,
        score_mod: Mod | None,
        mask_mod: Mod | None,
        wanted: Sequence[int] = (2, 4, 13, 19),
        score_dtype: torch.dtype = torch.float32,
    ) -> Traced:
        """Trace, and find ranges of at most `wanted` (B, H, L, S).

        Raises `LawNotRun` where something is read beyond a captured tensor even at the first of all indices.
        """
        found = trace(score_mod, mask_mod, score_dtype=score_dtype)
        device = next((t.device for t in found.captured if isinstance(t, Tensor) and t.dim()), torch.device("cpu"))
        if device.type != "cpu":
            found = trace(score_mod, mask_mod, score_dtype=score_dtype, device=device)
        traced = cls(*found, device, dict(zip(INDEX_INPUTS, wanted, strict=True)))
        return traced._replace(sizes=_reached(traced, score_dtype))


def _inputs(traced: Traced, sizes: Mapping[str, int], named: Mapping[str, Tensor]) -> Inputs:
    index = {
        name: torch.arange(sizes[name], dtype=torch.int32, device=traced.device).view(
            [-1 if i == d else 1 for i in range(4)]
        )
        for d, name in enumerate(INDEX_INPUTS)
    }
    n = len(traced.tensors)
    return Inputs({**index, **named}, traced.captured[:n], traced.captured[n:], traced.ints, traced.device)


def _reached(traced: Traced, score_dtype: torch.dtype) -> dict[str, int]:
    """The largest ranges, about, in which no index of a captured tensor goes beyond it."""
    sizes = dict(traced.sizes)
    roots = [root for root in (traced.parsed.score, traced.parsed.mask) if root is not None]
    reads = [
        (index, n)
        for load in walk(*roots)
        if load.op is Op.LOAD
        for index, n in zip(load.args[1:], _shape(load, traced.tensors), strict=True)
    ]
    for index, n in reads:
        if index.op is Op.INPUT:
            sizes[str(index.value)] = min(sizes[str(index.value)], n)
    if 0 in sizes.values():
        raise LawNotRun("a captured tensor that it reads is empty")
    with torch.no_grad():
        while (beyond := _beyond(traced, reads, sizes, score_dtype)) is not None:
            axes = [name for name in INDEX_INPUTS if name in beyond.axes and sizes[name] > 1]
            if not axes:
                raise LawNotRun("it reads beyond a captured tensor at the first of all indices")
            largest = max(axes, key=lambda name: sizes[name])
            sizes[largest] -= max(1, sizes[largest] // 8)
    return sizes


def _beyond(
    traced: Traced, reads: Sequence[tuple[Node, int]], sizes: Mapping[str, int], score_dtype: torch.dtype
) -> Node | None:
    """An index that leaves its dimension somewhere, if there is one."""
    score = traced._replace(sizes=sizes).score(score_dtype)
    inputs = _inputs(traced, sizes, {"score": score})
    for index, n in reads:
        (value,) = evaluate([index], inputs)
        if bool(((value < -n) | (value >= n)).any()):
            return index
    return None


def _shape(load: Node, tensors: Sequence[Tensor]) -> torch.Size:
    base = load.args[0].value
    assert isinstance(base, tuple)
    return tensors[base[0]].shape
