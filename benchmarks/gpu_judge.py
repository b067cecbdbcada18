"""What is right: dense attention in float64 on a part of a problem, and how far a contender may be from it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from gpu_problem import Attend, Problem, chunks
from torch import Tensor

EVERY_ROW = 16384  # up to this length; of longer sequences, so many rows:
SOME_ROWS = 256
TIMES = 8  # as far from float64 as plain torch in the inputs' precision, this often


class Judge:
    """Compares the last key head of the last batch entry, and the query heads that share it.

    All rows of the output and of the gradients are compared up to the length `every`. Beyond it, the output and dq on some
    random rows; the gradient of the output is zero on all other rows, so that dk and dv follow from these rows too, and
    all of dk and dv is compared.
    """

    def __init__(self, problem: Problem, every: int = EVERY_ROW) -> None:
        self.problem, S = problem, problem.cell.S
        self.rows, self.dout = torch.arange(S), problem.dout
        if S > every:
            inner = torch.randperm(S - 2)[: SOME_ROWS - 2] if S > SOME_ROWS else torch.randperm(S - 2)[: S // 4]
            self.rows = torch.cat([inner + 1, torch.tensor([0, S - 1])]).sort().values
            kept = torch.zeros(S, 1, dtype=torch.bool)
            kept[self.rows] = True
            self.dout = problem.dout.masked_fill(~kept.to(problem.device), 0.0)
        self.exact, self.plain = (self.dense(d) for d in (torch.float64, problem.dout.dtype))

    def compared(self, t: Tensor) -> Tensor:
        """The heads that are compared."""
        cell = self.problem.cell
        heads = cell.Hq // cell.Hkv if t.shape[1] == cell.Hq else 1
        return t[-1:, -heads:].detach()

    def dense(self, dtype: torch.dtype) -> list[Tensor]:
        """out and dq on the rows, dk and dv, with products in `dtype`."""
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        q, k, v = (self.compared(t).to(dtype) for t in self.problem.leaves)
        k, v = k.requires_grad_(), v.requires_grad_()
        dout, parts = self.compared(self.dout).to(dtype), []
        sums = [torch.zeros_like(t, dtype=torch.float64) for t in (k, v)]
        for rows in chunks(self.rows, q.shape[1] * q.shape[2]):
            at = rows.to(q.device)
            part = q[:, :, at].requires_grad_()
            out = self._attend(part, k, v, rows, wide)
            dq, *grads = torch.autograd.grad(out, [part, k, v], dout[:, :, at])
            parts.append((out.detach(), dq))
            for total, grad in zip(sums, grads, strict=True):
                total += grad
        return [torch.cat(column, 2) for column in zip(*parts, strict=True)] + sums

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, wide: torch.dtype) -> Tensor:
        """Dense attention of some rows of the compared heads."""
        problem, Hq = self.problem, self.problem.cell.Hq
        index = problem.index(range(Hq - q.shape[1], Hq), rows)
        scores = (q @ k.mT).to(wide) / math.sqrt(q.shape[-1])
        score_mod, mask_mod = problem.score_mod(), problem.mask_mod()
        if score_mod is not None:
            scores = score_mod(scores, *index)
        if mask_mod is not None:
            scores = scores.masked_fill(~mask_mod(*index), -math.inf)
        return torch.softmax(scores, -1).to(v.dtype) @ v

    def errors(self, attend: Attend, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """The largest errors of the output and of the gradients, by pass. Raises if one is far beyond the plain error.

        Calls `check` once the contender has run, which may have taken a while.
        """
        found = []
        results = [self.compared(t) for t in self.problem.gradients(attend, self.dout)]
        check()
        at = self.rows.to(self.problem.device)
        results[:2] = [t[:, :, at] for t in results[:2]]
        for name, value, exact, plain in zip(("out", "dq", "dk", "dv"), results, self.exact, self.plain, strict=True):
            error = (value.double() - exact).abs().max().item()
            rounding = torch.finfo(value.dtype).eps * exact.abs().max().item()
            allowed = TIMES * max(rounding, (plain.double() - exact).abs().max().item())
            if not error <= allowed:
                raise ValueError(f"wrong: the error of {name} is {error:.2e}, allowed is {allowed:.2e}")
            found.append(error)
        return {"forward": found[0], "backward": max(found[1:]), "forward_backward": max(found)}
