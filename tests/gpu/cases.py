"""An attention problem on the GPU, solved by flexattn, densely in float64, and by plain torch in the inputs' precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from assertions import EPSILON, assert_within_budget
from torch import Tensor

import flexattn
from flexattn import AuxRequest, BlockMask

DEVICE = "cuda"
ELEMENTS = 1 << 26  # scores that a dense solution holds at a time
PARTS = 16  # at least so many groups of rows, where there are so many rows
REFERENCE_LENGTH = 2048  # up to here all scores of a case fit in memory at once

Mod = Callable[..., Tensor]
Results = dict[str, Tensor]


def qkv(
    B: int = 2,
    H: int = 4,
    Hkv: int | None = None,
    L: int = 1000,
    S: int | None = None,
    E: int = 64,
    Ev: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor]:
    Hkv, S, Ev = H if Hkv is None else Hkv, L if S is None else S, E if Ev is None else Ev
    shapes = ((B, H, L, E), (B, Hkv, S, E), (B, Hkv, S, Ev))
    return tuple(torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes)  # type: ignore[return-value]


@dataclass
class Case:
    """Operands of one call, and the gradients that arrive for its output and its lse.

    Attributes:
        score: makes the score_mod from `captured`, so that float64 copies can take the place of those.
        mask: the mask_mod. With `block_mask` it is not passed on; it then says what the lists mean, element by element.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mod | None = None
    score: Callable[..., Mod] | None = None
    captured: tuple[Tensor, ...] = ()
    block_mask: BlockMask | None = None
    scale: float | None = None
    options: dict[str, Any] | None = None
    dout: Tensor = field(init=False)
    dlse: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rows = self.query.shape[:3]
        self.dout = torch.randn(*rows, self.value.shape[-1], dtype=self.query.dtype, device=self.query.device)
        self.dlse = torch.randn(rows, device=self.query.device)

    def run(
        self, backend: str = "auto", dtype: torch.dtype | None = None, attend: Any = flexattn.flex_attention
    ) -> Results:
        """What flexattn computes, of copies in `dtype` if one is given: outputs and all gradients."""
        q, k, v = leaves = [_leaf(t, dtype) for t in (self.query, self.key, self.value)]
        captured = [_leaf(t, dtype) for t in self.captured]
        out, aux = attend(
            q,
            k,
            v,
            self.score(*captured) if self.score else None,
            self.block_mask,
            self.scale,
            q.shape[1] != k.shape[1],
            kernel_options=self.options,
            return_aux=AuxRequest(lse=True, max_scores=True),
            mask_mod=self.mask if self.block_mask is None else None,
            backend=backend,
        )
        seeds = [self.dout.to(out.dtype), self.dlse.to(aux.lse.dtype)]
        grads = torch.autograd.grad([out, aux.lse], leaves + captured, seeds)
        return _named([out.detach(), aux.lse.detach(), aux.max_scores, *grads])

    def dense(self, dtype: torch.dtype) -> tuple[Results, list[Tensor]]:
        """The same by dense attention in plain torch, its products in `dtype`, some rows at a time.

        Also the gradients of the captured tensors by group of rows: [groups, *shape] for each.
        """
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        k, v = leaves = [_leaf(t, dtype) for t in (self.key, self.value)]
        captured = [_leaf(t, torch.float64 if dtype is torch.float64 else None) for t in self.captured]
        B, H, L, _ = self.query.shape
        step = max(1, min(-(-L // PARTS), ELEMENTS // max(1, B * H * k.shape[2])))
        rows, sums, parts = [], [], []
        for start in range(0, L, step):
            part = slice(start, min(start + step, L))
            q = _leaf(self.query[:, :, part], dtype)
            out, lse, top = self._rows(q, k, v, captured, start, wide)
            seeds = [self.dout[:, :, part].to(dtype), self.dlse[:, :, part].to(wide)]
            wrt = [q, *leaves, *captured]
            found = torch.autograd.grad([out, lse], wrt, seeds, allow_unused=True)
            dq, *grads = [torch.zeros_like(t) if g is None else g for g, t in zip(found, wrt, strict=True)]
            rows.append([out.detach(), lse.detach(), top, dq])
            grads = [g.double() for g in grads]
            sums = [a + b for a, b in zip(sums, grads, strict=True)] if sums else grads
            parts.append(grads[2:])
        joined = [torch.cat(column, dim=2) for column in zip(*rows, strict=True)]
        return _named(joined + sums), [torch.stack(group) for group in zip(*parts, strict=True)]

    def _rows(
        self, q: Tensor, k: Tensor, v: Tensor, captured: list[Tensor], start: int, wide: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """out, lse and max_scores of the rows of `q`, the first of which is row `start`."""
        B, H, L, E = q.shape
        S = k.shape[2]
        k, v = (t.repeat_interleave(H // t.shape[1], dim=1).expand(B, -1, -1, -1) for t in (k, v))
        scores = (q @ k.mT).to(wide) * (1 / math.sqrt(E) if self.scale is None else self.scale)
        index = [torch.arange(n, dtype=torch.int32, device=q.device) for n in (B, H, L, S)]
        index[2] = index[2] + start
        b, h, i, j = (t.view([-1 if d == at else 1 for d in range(4)]) for at, t in enumerate(index))
        if self.score is not None:
            scores = self.score(*captured)(scores, b, h, i, j)
        if self.mask is not None:
            scores = scores.masked_fill(~self.mask(b, h, i, j), -math.inf)
        top = scores.detach().amax(-1, keepdim=True)
        offset = top.masked_fill(top == -math.inf, 0.0)
        weights = torch.exp(scores - offset)
        total = weights.sum(-1, keepdim=True)
        nothing = total == 0
        total = total.masked_fill(nothing, 1.0)
        lse = (offset + torch.log(total)).masked_fill(nothing, -math.inf)
        return (weights / total).to(v.dtype) @ v, lse.squeeze(-1), top.squeeze(-1)


def assert_right(case: Case) -> None:
    """All that flexattn computes of the case is right, element by element."""
    assert_results(case, case.run())


def assert_results(case: Case, actual: Results) -> None:
    """`actual` is as close to float64, element by element, as plain torch in the same precision, up to a factor of 3.

    A weight is exp(score - max), in the backward exp(score - lse): the rounding of either, eps * |score| in float32, is
    a relative error of the weight, which the smallest budget counts. It matters for float32 only.

    The error of a captured tensor's gradient is a sum over rows, which may vanish by chance in the plain solution. Its
    yardstick is what such a sum may well reach: three standard deviations, from the plain errors of groups of rows.
    """
    dtype = case.query.dtype
    exact, exact_parts = case.dense(torch.float64)
    plain, plain_parts = case.dense(dtype)
    for i, (a, b) in enumerate(zip(plain_parts, exact_parts, strict=True)):
        plain[f"d captured {i}"] = exact[f"d captured {i}"] + 3 * (a - b).square().sum(0).sqrt()
    if max(case.query.shape[2], case.key.shape[2]) <= REFERENCE_LENGTH:
        exact = case.run("reference", torch.float64)
    assert actual.keys() == exact.keys()
    condition = 1 + max(_largest(exact["lse"]), _largest(exact["max_scores"]))
    for name, value in actual.items():
        stored = dtype if name.startswith("d") else value.dtype
        magnitude = 0.0
        if name not in ("lse", "max_scores"):
            magnitude = _largest(exact[name]) * condition * EPSILON[torch.float32] / EPSILON[stored]
        assert_within_budget(value, exact[name], plain[name], name, stored, magnitude)


def _largest(t: Tensor) -> float:
    """The largest finite magnitude."""
    finite = t[torch.isfinite(t)].abs()
    return finite.max().item() if finite.numel() else 0.0


def _leaf(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    return (t if dtype is None else t.to(dtype)).detach().requires_grad_()


def _named(values: list[Tensor]) -> Results:
    names = ["out", "lse", "max_scores", "dq", "dk", "dv", *(f"d captured {i}" for i in range(len(values) - 6))]
    return dict(zip(names, values, strict=True))
