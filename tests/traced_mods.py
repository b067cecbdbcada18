"""Mods of many kinds, and how a cached trace is compared with a fresh one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexattn.codegen.trace import Trace, positional_count, trace
from flexattn.codegen.trace_cache import cache_info, cached_trace, why_uncached

CPU = torch.device("cpu")
Mod = Callable[..., Any]

slopes = torch.tensor([0.5, 0.25])
other = torch.tensor([0.25, 0.5])
ids = torch.tensor([0, 0, 1, 1])


def roles(mod: Mod | None) -> tuple[Mod | None, Mod | None]:
    return (None, mod) if mod is not None and positional_count(mod) == 4 else (mod, None)


def same(found: Trace, expected: Trace) -> None:
    assert found.program == expected.program
    assert len(found.captured) == len(expected.captured)
    for a, b in zip(found.captured, expected.captured, strict=True):
        if isinstance(a, float):
            assert (a, math.copysign(1, a)) == (b, math.copysign(1, b))
        elif a is not b:  # a tensor that the mod computes: made at every call
            assert a.dtype == b.dtype and a.shape == b.shape and a.requires_grad == b.requires_grad
            assert torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())
    assert found.ints == expected.ints


def assert_same(*mods: Mod | None, **options: Any) -> None:
    """The cache and a fresh trace agree, also the second time."""
    score_mod, mask_mod = roles(mods[0]) if len(mods) == 1 else mods
    for _ in range(2):
        expected = trace(score_mod, mask_mod, **options)
        same(cached_trace(score_mod, mask_mod, **{"device": CPU, **options}), expected)


def hits(*mods: Mod | None) -> bool:
    """Whether a call finds its trace, which an earlier one has made."""
    before = cache_info().hits
    score_mod, mask_mod = roles(mods[0]) if len(mods) == 1 else mods
    cached_trace(score_mod, mask_mod, device=CPU)
    return cache_info().hits == before + 1


def assert_hits(make: Callable[[], Any]) -> None:
    """Mods of one kind, made anew for each call, are traced once."""
    made = make()
    assert_same(*made) if isinstance(made, tuple) else assert_same(made)
    again = make()
    assert hits(*again) if isinstance(again, tuple) else hits(again), why_uncached(*roles(again), device=CPU)


def assert_opaque(mod: Mod, reason: str = "") -> None:
    """A mod that is traced at every call."""
    assert_same(mod)
    assert not hits(mod)
    assert reason in why_uncached(*roles(mod), device=CPU)


class Module(torch.nn.Module):
    kind = "slope"

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.clone())
        self.register_buffer("table", weight.clone())
        self.scale: Any = 2

    def forward(self, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + self.weight[h] * (k - q) * self.scale

    def method(self, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.biased(score, h) if self.kind == "slope" else score

    def biased(self, score: Tensor, h: Tensor) -> Tensor:
        return score + self.table[h]  # type: ignore[index]


class Window:
    """A callable object with a property, a class attribute, and a static method."""

    extra = 1

    def __init__(self, size: Any) -> None:
        self.size = size

    @property
    def reach(self) -> Any:
        return self.size + self.extra

    @staticmethod
    def near(q: Tensor, k: Tensor, reach: Any) -> Tensor:
        return q - k < reach

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.near(q, k, self.reach)


@dataclass(frozen=True)
class Frozen:
    size: int
    slopes: Tensor | None = None

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = q - k < self.size
        return near if self.slopes is None else near & (self.slopes[h] > 0)


class Config(NamedTuple):
    window: int
    scale: float


class Namespace:
    WINDOW = 3
    table = torch.tensor([1.0, 2.0])

    @staticmethod
    def near(q: Tensor, k: Tensor) -> Tensor:
        return q - k < 3


def closure(value: Any) -> Mod:
    return lambda s, b, h, q, k: s * value


def indexed(value: Tensor) -> Mod:
    return lambda s, b, h, q, k: s + value[h]


def two(first: Tensor, second: Tensor) -> Mod:
    return lambda s, b, h, q, k: s + first[h] + second[h]


def scaled(value: Any, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return s * value


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k
