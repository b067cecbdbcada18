"""What `bench_captured_grads.py` compares: score_mods with learned tensors, who solves them, and what is right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as peer

import flexattn
from flexattn.kernel_options import OPTIONS

BUCKETS, FARTHEST, GROUPS = 32, 128, 16
ON_CPU = ("flexattn", "dense", "dense_gather", "sdpa", "floor")
ON_GPU = ("flexattn", "deterministic", "torch_flex", "floor")
CONTENDERS = ("flexattn", "deterministic", "torch_flex", "dense", "dense_gather", "sdpa", "floor")
ABOUT = {
    "flexattn": "flexattn, every captured tensor learned",
    "deterministic": 'flexattn with kernel_options={"DETERMINISTIC": True}',
    "torch_flex": "compiled flex_attention of PyTorch; for `gates` it gets F and F.clone(): it reads no learned tensor twice",
    "dense": "plain torch: softmax(q k + bias) v; the bias is expanded so that its backward is sums, not additions by index",
    "dense_gather": "the same, with the bias indexed as the mod does",
    "sdpa": "scaled_dot_product_attention with the bias of `dense` as a float attn_mask that requires grad",
    "floor": "flexattn without a score_mod: what the attention alone takes",
}

Mod = Callable[..., Tensor]


class Case(NamedTuple):
    """A learned bias.

    Attributes:
        tensors: (B, H, S, device) to the tensors, float32, the learned one first.
        mod: of those tensors, the score_mod.
        bias: of those tensors and S, what `mod` adds, [H or B x H, S, S], in the fewest operations of torch.
        goal: backward time of PyTorch's flex_attention divided by ours that is aimed at.
    """

    tensors: Callable[[int, int, int, str], list[Tensor]]
    mod: Callable[..., Mod]
    bias: Callable[..., Tensor]
    goal: float


def bucket(distance: Tensor) -> Tensor:
    """T5's bucket of a distance q_idx - kv_idx, not bidirectional."""
    n, exact = distance.clamp(min=0), BUCKETS // 2
    far = (n.clamp(min=1).float() / exact).log() / math.log(FARTHEST / exact) * (BUCKETS - exact)
    return torch.where(n < exact, n, (exact + far.long()).clamp(max=BUCKETS - 1))


def skewed(row: Tensor, S: int) -> Tensor:
    """[H, 2S - 1] to [H, S, S]: entry (q, k) is `row[k - q + S - 1]`, by repetition, whose backward is a sum."""
    repeated = F.pad(row, (0, 1)).repeat(1, S)[:, : S * (2 * S - 1)]
    return repeated.view(-1, S, 2 * S - 1)[:, :, S - 1 :]


def distances(S: int, device: Any) -> Tensor:
    along = torch.arange(S, device=device)
    return along - along.view(-1, 1)


def grouped(S: int, device: str) -> Tensor:
    return torch.randint(0, GROUPS, (S,), device=device)


def one_hot_bias(table: Tensor, group: Tensor, S: int) -> Tensor:
    chosen = F.one_hot(group, GROUPS).to(table.dtype)
    return (chosen @ table @ chosen.mT).view(1, S, S)


def gates(B: int, H: int, S: int, device: str) -> list[Tensor]:
    return [F.logsigmoid(torch.randn(B, H, S, device=device) + 4).cumsum(-1)]


CASES: dict[str, Case] = {
    "slopes": Case(
        lambda B, H, S, device: [flexattn.mods.alibi_slopes(H, device)],
        lambda slopes: lambda s, b, h, q, k: s + slopes[h] * (k - q),
        lambda slopes, S: slopes.view(-1, 1, 1) * distances(S, slopes.device),
        5.0,
    ),
    "t5": Case(
        lambda B, H, S, device: [torch.randn(BUCKETS, H, device=device)],
        lambda table: lambda s, b, h, q, k: s + table[bucket(q - k), h],
        lambda table, S: skewed(table[bucket(-torch.arange(1 - S, S, device=table.device))].mT, S),
        5.0,
    ),
    "relative": Case(
        lambda B, H, S, device: [torch.randn(H, 2 * S - 1, device=device)],
        lambda row: lambda s, b, h, q, k: s + row[h, k - q + (row.shape[1] - 1) // 2],
        skewed,
        1.3,
    ),
    "gates": Case(
        gates,
        lambda f, again=None: lambda s, b, h, q, k: s + f[b, h, q] - (f if again is None else again)[b, h, k],
        lambda f, S: f.unsqueeze(-1) - f.unsqueeze(-2),
        1.3,
    ),
    "pair": Case(
        lambda B, H, S, device: [torch.randn(H, S, S, device=device)],
        lambda pair: lambda s, b, h, q, k: s + pair[h, q, k],
        lambda pair, S: pair,
        1.3,
    ),
    "groups": Case(
        lambda B, H, S, device: [torch.randn(GROUPS, GROUPS, device=device), grouped(S, device)],
        lambda table, group: lambda s, b, h, q, k: s + table[group[q], group[k]],
        one_hot_bias,
        1.3,
    ),
}
GATHERED = ("t5", "relative", "groups")  # whose bias can be written by index too


class Cell(NamedTuple):
    """One attention problem: a case of CASES and sizes."""

    case: str
    dtype: str
    B: int
    H: int
    S: int
    D: int

    @property
    def shape(self) -> str:
        return f"B{self.B} H{self.H} S{self.S} D{self.D}"


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def can_solve(contender: str, case: str) -> bool:
    """Whether a contender has its own way to compute a case, in this version of flexattn."""
    if contender == "deterministic":
        return "DETERMINISTIC" in OPTIONS
    return contender != "dense_gather" or case in GATHERED


class Entry(NamedTuple):
    """One contender, ready to run: `attend(*leaves)`."""

    attend: Callable[..., Tensor]
    leaves: list[Tensor]
    dout: Tensor

    def gradients(self, attend: Callable[..., Tensor]) -> list[Tensor]:
        """The output, and the gradients of q, k, v and of the learned tensor."""
        out = attend(*self.leaves)
        return [out, *torch.autograd.grad(out, self.leaves, self.dout)]


class Problem:
    """Inputs of a cell and the contenders that solve it."""

    def __init__(self, cell: Cell, device: str) -> None:
        torch.manual_seed(0)
        self.cell, self.device, self.case = cell, device, CASES[cell.case]
        shape, dtype = (cell.B, cell.H, cell.S, cell.D), getattr(torch, cell.dtype)
        self.inputs = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
        self.dout = torch.randn(shape, dtype=dtype, device=device)
        learned, *self.rest = self.case.tensors(cell.B, cell.H, cell.S, device)
        self.learned = learned.requires_grad_()

    def entry(self, name: str) -> Entry:
        """A contender. What a user would do once, before the first call, is done: block masks and mask tensors."""
        attend = self._floor() if name == "floor" else getattr(self, f"_{name}")()
        return Entry(attend, [*self.inputs, *([] if name == "floor" else [self.learned])], self.dout)

    def _flexattn(self, options: dict[str, Any] | None = None) -> Callable[..., Tensor]:
        S, case, rest = self.cell.S, self.case, self.rest
        mask = flexattn.create_block_mask(causal, None, None, S, S, self.device)
        backend = "tiled" if self.device == "cpu" else "triton"

        def attend(q: Tensor, k: Tensor, v: Tensor, *learned: Tensor) -> Tensor:
            mod = case.mod(*learned, *rest) if learned else None
            return flexattn.flex_attention(q, k, v, mod, mask, kernel_options=options, backend=backend)

        return attend

    def _deterministic(self) -> Callable[..., Tensor]:
        return self._flexattn({"DETERMINISTIC": True})

    def _floor(self) -> Callable[..., Tensor]:
        return self._flexattn()

    def _torch_flex(self) -> Callable[..., Tensor]:
        S, make, rest, twice = self.cell.S, self.case.mod, self.rest, self.cell.case == "gates"
        mask = peer.create_block_mask(causal, None, None, S, S, self.device)

        @torch.compile(dynamic=False)
        def compiled(q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Tensor:
            return peer.flex_attention(q, k, v, score_mod=make(*tensors), block_mask=mask)

        def attend(q: Tensor, k: Tensor, v: Tensor, learned: Tensor) -> Tensor:
            # A learned tensor that is read at two places is refused: they are two tensors then, outside the graph.
            return compiled(q, k, v, learned, *([learned.clone()] if twice else rest))

        return attend

    def _dense(self, gathered: bool = False) -> Callable[..., Tensor]:
        dropped = distances(self.cell.S, self.device) > 0

        def attend(q: Tensor, k: Tensor, v: Tensor, learned: Tensor) -> Tensor:
            bias = self.gathered(learned) if gathered else self.case.bias(learned, *self.rest, self.cell.S)
            return attention(q, k, v, bias, dropped)

        return attend

    def _dense_gather(self) -> Callable[..., Tensor]:
        return self._dense(gathered=True)

    def _sdpa(self) -> Callable[..., Tensor]:
        dropped = distances(self.cell.S, self.device) > 0

        def attend(q: Tensor, k: Tensor, v: Tensor, learned: Tensor) -> Tensor:
            bias = self.case.bias(learned, *self.rest, self.cell.S).masked_fill(dropped, -math.inf).to(q.dtype)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias if bias.dim() == 4 else bias.unsqueeze(0))

        return attend

    def gathered(self, learned: Tensor, heads: slice = slice(None)) -> Tensor:
        """What the mod adds, by its own indices: [B, heads, S, S]."""
        sizes = (self.cell.B, self.cell.H, self.cell.S, self.cell.S)
        index = [torch.arange(n, device=self.device) for n in sizes]
        index[1] = index[1][heads]
        index = [t.view([-1 if d == at else 1 for d in range(4)]) for at, t in enumerate(index)]
        return self.case.mod(learned, *self.rest)(learned.new_zeros(()), *index)

    def exact(self, dtype: torch.dtype) -> list[Tensor]:
        """Dense attention with products in `dtype`, by head.

        out, dq, dk, dv, the gradient of the learned tensor, and what that is if no terms of the sum cancel.
        """
        learned = self.learned.detach().to(torch.float64 if dtype is torch.float64 else torch.float32).requires_grad_()
        total, terms = (torch.zeros_like(learned, dtype=torch.float64, requires_grad=False) for _ in range(2))
        parts = []
        dropped = distances(self.cell.S, self.device) > 0
        for h in range(self.cell.H):
            own = slice(h, h + 1)
            q, k, v = (t.detach()[:, own].to(dtype).requires_grad_() for t in self.inputs)
            bias = self.gathered(learned, own)
            out = attention(q, k, v, bias, dropped)
            *grads, scores = torch.autograd.grad(out, [q, k, v, bias], self.dout[:, own].to(dtype))
            parts.append([out.detach(), *grads])
            total += torch.autograd.grad(bias, learned, scores, retain_graph=True)[0]
            terms += torch.autograd.grad(bias, learned, scores.abs())[0].abs()
        return [torch.cat(part, 1) for part in zip(*parts, strict=True)] + [total, terms]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropped: Tensor) -> Tensor:
    """Dense attention in plain torch; scores are float32, or the bias's dtype."""
    scores = (q @ k.mT).to(bias.dtype) / math.sqrt(q.shape[-1]) + bias
    return torch.softmax(scores.masked_fill(dropped, -math.inf), -1).to(v.dtype) @ v


class Judge:
    """Float64, and plain torch in the inputs' precision as the yardstick of an error."""

    def __init__(self, problem: Problem) -> None:
        *self.exact, terms = problem.exact(torch.float64)
        *self.plain, _ = problem.exact(problem.dout.dtype)
        self.rounding = torch.finfo(torch.float32).eps * terms.max().item()  # of a sum in float32, whatever cancels

    def errors(self, entry: Entry) -> dict[str, float]:
        """The largest errors by pass. Raises `ValueError` if one is far beyond that of plain torch."""
        found = []
        for name, value, exact, plain in zip(
            ("out", "dq", "dk", "dv", "dlearned"), entry.gradients(entry.attend), self.exact, self.plain, strict=True
        ):
            error = (value.double() - exact).abs().max().item()
            rounding = torch.finfo(entry.dout.dtype).eps * exact.abs().max().item()
            rounding = max(rounding, self.rounding if name == "dlearned" else 0.0)
            allowed = 8 * max(rounding, (plain.double() - exact).abs().max().item())
            if not error <= allowed:
                raise ValueError(f"wrong: the error of {name} is {error:.2e}, allowed is {allowed:.2e}")
            found.append(error)
        return {"forward": found[0], "backward": max(found[1:]), "forward_backward": max(found)}
