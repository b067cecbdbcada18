"""Whether one part of the inputs of an attention reaches another part of its results, to the bit.

An `Experiment` runs an attention, forward and backward, on random inputs, and again with some positions replaced by other
large values. What may not depend on these positions must then be what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .handed import advice, handed, returned
from .sizes import Sizes

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

# Large, and yet products of a hundred terms stay finite in the score's float32.
_MAGNITUDE = {torch.float16: 100.0, torch.bfloat16: 1000.0}


class Results(NamedTuple):
    """What an attention gave: the output [B, Hq, L, Ev], and the gradients of query, key and value, or None."""

    out: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None


@dataclass(frozen=True)
class Change:
    """A result that changed: its first element that did, (b, head, position, column), both values, and how many did."""

    name: str
    at: tuple[int, ...]
    before: float
    after: float
    count: int

    def __str__(self) -> str:
        b, h, position, column = self.at
        index = "q_idx" if self.name in ("out", "dq") else "kv_idx"
        return f"{self.name}[b={b}, h={h}, {index}={position}, {column}] is {self.before:.9g}, and {self.after:.9g}"


class Positions(NamedTuple):
    """Positions of queries, [B, L], and of keys, [B, S], bool."""

    queries: Tensor
    keys: Tensor

    def __invert__(self) -> Positions:
        return Positions(~self.queries, ~self.keys)

    def __and__(self, other: Positions) -> Positions:
        return Positions(self.queries & other.queries, self.keys & other.keys)


@dataclass
class Experiment:
    """An attention `(query, key, value) -> out`, and the inputs to try it with.

    `trusted` are the queries whose incoming gradient is not zero. `backward` is whether gradients are looked at; they are
    not, either, of an attention whose output does not require any.
    """

    attention: Attention
    sizes: Sizes
    dtype: torch.dtype
    device: torch.device
    seed: int
    trusted: Tensor | None = None
    backward: bool = True
    _inputs: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)
    _grads: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        B, Hq, Hkv, L, S, E, Ev = self.sizes
        self._generator = torch.Generator().manual_seed(self.seed)
        self._inputs = [self._pair(shape) for shape in ((B, Hq, L, E), (B, Hkv, S, E), (B, Hkv, S, Ev))]
        self.before = self.run(None)
        again = self.changes(self.run(None), Positions(*(torch.ones(B, n, dtype=torch.bool) for n in (L, S))))
        if again:
            raise AssertionError(
                f"the attention does not repeat its own bits: on the same inputs {again[0]} in a second run. Turn off what is "
                "random in it, such as dropout, and ask for deterministic kernels, or bits say nothing"
            )

    def _pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Plain values, and large ones."""
        plain, large = (torch.randn(shape, generator=self._generator, dtype=torch.float64) for _ in range(2))
        large = large * _MAGNITUDE.get(self.dtype, 1e4)
        return plain.to(self.device, self.dtype), large.to(self.device, self.dtype)

    def run(self, changed: Positions | None, opposed: bool = False) -> Results:
        """The results with the values of some positions replaced: query, key, value and incoming gradient.

        `opposed`: by such large queries and keys that all scores between them are far below zero.
        """
        places = (None, None, None) if changed is None else (changed.queries, changed.keys, changed.keys)
        given = _opposed(self._inputs) if opposed else self._inputs
        inputs = [_mixed(pair, where).requires_grad_(self.backward) for pair, where in zip(given, places, strict=True)]
        with torch.enable_grad():
            out = self.attention(*map(handed, inputs))
        self._check(out)
        if not self.backward or not out.requires_grad:
            return Results(out.detach(), None, None, None)
        if self._grads is None:
            self._grads = self._pair(tuple(out.shape))
        grad = _mixed(self._grads, places[0]).to(out.dtype)
        if self.trusted is not None:
            grad = grad * self.trusted.to(grad.device)[:, None, :, None]
        found = torch.autograd.grad(out, inputs, grad, allow_unused=True)
        return Results(out.detach(), *found)

    def _check(self, out: Any) -> None:
        B, Hq, _, L, *_ = self.sizes
        if not isinstance(out, Tensor) or out.dim() != 4 or out.shape[:3] != (B, Hq, L):
            wanted = f"attention(query, key, value) must return a tensor [B, heads, queries, Ev] = [{B}, {Hq}, {L}, Ev]"
            raise ValueError(f"{wanted}; got {returned(out)}{advice(out, (B, Hq, L))}")

    def changes(self, after: Results, compared: Positions, before: Results | None = None) -> list[Change]:
        """The results that are not the same at the positions that are compared. Zeros of either sign are the same.

        `before` is by default what the plain values give.
        """
        found = []
        for name, one, two in zip(Results._fields, before or self.before, after, strict=True):
            if one is None or two is None:
                continue
            where = compared.queries if name in ("out", "dq") else compared.keys
            differs = (one != two) & ~(one.isnan() & two.isnan()) & where.to(one.device)[:, None, :, None]
            count = int(differs.sum())
            if count:
                at = _first(differs)
                found.append(Change(name, at, float(one[at]), float(two[at]), count))
        return found


def _opposed(inputs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """With one column of the large values that outweighs the others: below zero in queries, above it in keys."""
    made = []
    for (plain, large), sign in zip(inputs, (-1, 1, None), strict=True):
        if sign is not None:
            large = large.clone()
            most = large.abs().amax()
            large[..., 0] = sign * (large.shape[-1] ** 0.5 + 1) * (most + large[..., 0].abs())
        made.append((plain, large))
    return made


def _first(differs: Tensor) -> tuple[int, ...]:
    """The first element by position, then by batch entry, head and column."""
    position, b, h, column = differs.permute(2, 0, 1, 3).nonzero()[0].tolist()
    return b, h, position, column


def _mixed(pair: tuple[Tensor, Tensor], where: Tensor | None) -> Tensor:
    """New values at some positions, the old ones elsewhere."""
    plain, large = pair
    return plain.clone() if where is None else torch.where(where.to(plain.device)[:, None, :, None], large, plain)
