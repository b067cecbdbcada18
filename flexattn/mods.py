"""Ready-made score_mods, and how to combine them. A score_mod takes (score, b, h, q_idx, kv_idx) and returns a score.

`score` is `scale * <query, key>` in float32 (float64 for float64 inputs). `identity` is itself a score_mod; every other
name returns one. Tensors they hold are captured: pass a parameter and it gets its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ScoreMod = Callable[..., Tensor]

__all__ = ["alibi", "alibi_slopes", "compose", "identity", "relative_bias", "softcap"]


def identity(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """The score as it is."""
    return score


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """The slopes of ALiBi, [num_heads] float32: a geometric sequence that starts at its own ratio, 2**(-8 / num_heads).

    For a number of heads that is no power of two: the slopes of the next lower power of two, then every other slope of
    twice that many heads.

    Source: Press, Smith and Lewis, 2022, "Train Short, Test Long", section 3 and the authors' choice for other counts.

    Example:
        >>> import flexattn
        >>> flexattn.mods.alibi_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}; it must be at least 1")
    power = 2 ** int(math.log2(num_heads))

    def sequence(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    slopes = sequence(power) + sequence(2 * power)[0::2][: num_heads - power]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


class _Mod:
    @property
    def __name__(self) -> str:
        return repr(self)


@dataclass(frozen=True, eq=False)
class alibi(_Mod):
    """Attention with linear biases: `score + slopes[h] * (kv_idx - q_idx)`, a penalty that grows with the distance.

    Meant for causal attention, where `kv_idx <= q_idx`.

    Args:
        slopes: [Hq], one for each query head; `alibi_slopes(Hq)` for the paper's. Learnable if it requires grad.

    Source: Press, Smith and Lewis, 2022.

    Example:
        >>> import torch, flexattn
        >>> q, k, v = (torch.randn(1, 4, 32, 16) for _ in range(3))
        >>> mod = flexattn.mods.alibi(flexattn.mods.alibi_slopes(4))
        >>> flexattn.flex_attention(q, k, v, score_mod=mod, mask_mod=flexattn.masks.causal_mask).shape
        torch.Size([1, 4, 32, 16])
    """

    slopes: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.slopes, Tensor) or self.slopes.dim() != 1:
            raise ValueError("slopes must be a tensor [Hq]; write alibi(alibi_slopes(num_heads))")

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        return score + self.slopes[h] * (kv_idx - q_idx)

    def __repr__(self) -> str:
        return f"alibi({list(self.slopes.shape)})"


@dataclass(frozen=True, eq=False)
class softcap(_Mod):
    """Soft limit of the scores to (-cap, cap): `cap * tanh(score / cap)`.

    Args:
        cap: a positive number; Gemma 2 uses 50.

    Source: Gemma Team, 2024, "Gemma 2", section 2.

    Example:
        >>> import torch, flexattn
        >>> at = torch.tensor(0)
        >>> flexattn.mods.softcap(2.0)(torch.tensor([-100.0, 0.0, 100.0]), at, at, at, at).tolist()
        [-2.0, 0.0, 2.0]
    """

    cap: float

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise ValueError(f"softcap({self.cap}): the cap must be positive")

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        return self.cap * torch.tanh(score / self.cap)


@dataclass(frozen=True, eq=False)
class relative_bias(_Mod):
    """A learned bias for each head and distance: `score + table[h, kv_idx - q_idx + S - 1]`.

    Args:
        table: [Hq, 2 * S - 1] for queries and keys of length S; entry S - 1 is distance 0.

    Source: Shaw, Uszkoreit and Vaswani, 2018; as a bias, Raffel et al., 2020.

    Example:
        >>> import torch, flexattn
        >>> table = torch.tensor([[-1.0, 0.0, 1.0]])  # one head, S = 2: the key before, the same one, the one after
        >>> flexattn.create_mask(flexattn.mods.relative_bias(table), None, None, 2, 2)[0, 0].tolist()
        [[0.0, 1.0], [-1.0, 0.0]]
    """

    table: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.table, Tensor) or self.table.dim() != 2 or self.table.shape[1] % 2 == 0:
            raise ValueError("table must be a tensor [Hq, 2 * S - 1]")

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        return score + self.table[h, kv_idx - q_idx + self.table.shape[1] // 2]

    def __repr__(self) -> str:
        return f"relative_bias({list(self.table.shape)})"


@dataclass(frozen=True, eq=False)
class _Composed(_Mod):
    mods: tuple[ScoreMod, ...]

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        for mod in self.mods:
            score = mod(score, b, h, q_idx, kv_idx)
        return score

    def __repr__(self) -> str:
        return f"compose({', '.join(getattr(m, '__name__', repr(m)) for m in self.mods)})"


def compose(*score_mods: ScoreMod) -> ScoreMod:
    """The mods one after the other, the first one first; `identity` for none.

    Example:
        >>> import flexattn
        >>> flexattn.mods.compose(flexattn.mods.softcap(30.0), flexattn.mods.alibi(flexattn.mods.alibi_slopes(8)))
        compose(softcap(cap=30.0), alibi([8]))
    """
    for mod in score_mods:
        if not callable(mod):
            raise TypeError(f"compose takes score functions (score, b, h, q_idx, kv_idx), got {type(mod).__name__}")
    mods: tuple[Any, ...] = score_mods
    return _Composed(mods) if mods else identity
