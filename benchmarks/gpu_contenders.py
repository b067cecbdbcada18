"""What `bench_gpu.py` compares: the inputs of a cell, the callables that solve it, and what is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as peer

import flexattn

CASES = ("noop", "causal", "alibi", "softcap", "sliding_window", "document", "prefix_lm")
DEFAULT = ("flexattn", "torch_flex", "sdpa_flash", "sdpa_cudnn")
CONTENDERS = (*DEFAULT, "torch_flex_tuned", "sdpa_mask", "dense")
WINDOW, DOCUMENTS, PREFIX, CAP = 1024, 12, 1024, 30.0
ELEMENTS = 1 << 26  # scores that a dense solution holds at a time

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# A compiled backward frees its buffers otherwise, and cannot be timed by itself, again and again.
torch._functorch.config.donated_buffer = False


class Cell(NamedTuple):
    """One attention problem: a case of CASES and sizes."""

    case: str
    dtype: str
    B: int
    Hq: int
    Hkv: int
    S: int
    D: int

    @property
    def shape(self) -> str:
        heads = f"H{self.Hq}" if self.Hq == self.Hkv else f"H{self.Hq}/{self.Hkv}"
        return f"B{self.B} {heads} S{self.S} D{self.D}"


def can_solve(contender: str, case: str) -> bool:
    """Whether a contender has a way to compute a case."""
    if contender in ("sdpa_flash", "sdpa_cudnn"):  # without a mask tensor
        return case in ("noop", "causal")
    return contender != "sdpa_mask" or case not in ("noop", "softcap")


class Problem:
    """Inputs of a cell and the callables that solve it, all from (query, key, value) to the output."""

    def __init__(self, cell: Cell, device: str) -> None:
        torch.manual_seed(0)
        self.cell, self.device = cell, device
        query, key = (cell.B, cell.Hq, cell.S, cell.D), (cell.B, cell.Hkv, cell.S, cell.D)
        dtype = getattr(torch, cell.dtype)
        self.leaves = [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in (query, key, key)]
        self.dout = torch.randn(query, dtype=dtype, device=device)
        self.slopes = flexattn.mods.alibi_slopes(cell.Hq, device)
        cuts = torch.randperm(cell.S - 1)[: DOCUMENTS - 1].sort().values + 1  # documents of uneven lengths
        self.documents = torch.bucketize(torch.arange(cell.S), cuts, right=True).to(device)

    def mask_mod(self) -> Callable[..., Tensor] | None:
        documents, half = self.documents, self.cell.S // 2
        window, prefix = min(WINDOW, half), min(PREFIX, half)
        masks = {
            "noop": None,
            "sliding_window": lambda b, h, q, k: (q >= k) & (q - k < window),
            "document": lambda b, h, q, k: (documents[q] == documents[k]) & (q >= k),
            "prefix_lm": lambda b, h, q, k: (k < prefix) | (q >= k),
        }
        return masks.get(self.cell.case, lambda b, h, q, k: q >= k)

    def score_mod(self) -> Callable[..., Tensor] | None:
        slopes = self.slopes
        mods = {
            "alibi": lambda s, b, h, q, k: s + slopes[h] * (k - q),
            "softcap": lambda s, b, h, q, k: CAP * torch.tanh(s / CAP),
        }
        return mods.get(self.cell.case)

    def contender(self, name: str) -> Attend:
        """The callable. What a user would do once, before the first call, is done: block masks, mask tensors."""
        cell, S = self.cell, self.cell.S
        score_mod, mask_mod, gqa = self.score_mod(), self.mask_mod(), cell.Hq != cell.Hkv
        if name == "flexattn":
            mask = mask_mod and flexattn.create_block_mask(mask_mod, None, None, S, S, self.device)
            return lambda q, k, v: flexattn.flex_attention(q, k, v, score_mod, mask, enable_gqa=gqa)
        if name.startswith("torch_flex"):
            mode = "max-autotune-no-cudagraphs" if name == "torch_flex_tuned" else None
            compiled = torch.compile(peer.flex_attention, dynamic=False, mode=mode)
            theirs = mask_mod and peer.create_block_mask(mask_mod, None, None, S, S, self.device)
            return lambda q, k, v: compiled(q, k, v, score_mod=score_mod, block_mask=theirs, enable_gqa=gqa)
        if name in ("sdpa_flash", "sdpa_cudnn"):
            backend = SDPBackend.FLASH_ATTENTION if name == "sdpa_flash" else SDPBackend.CUDNN_ATTENTION

            def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=cell.case == "causal", enable_gqa=gqa)

            return sdpa
        index = self.indices(cell.Hq, 0, S)
        if name == "sdpa_mask":
            assert mask_mod is not None
            bias = mask_mod(*index)
            if cell.case == "alibi":
                distance = index[3] - index[2]
                bias = (self.slopes.view(1, -1, 1, 1) * distance).masked_fill(~bias, -math.inf)
                bias = bias.to(self.leaves[0].dtype)
            return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=gqa)
        widen = lambda t: t.repeat_interleave(cell.Hq // cell.Hkv, 1)
        return lambda q, k, v: self._rows(q, widen(k), widen(v), index, torch.float32)

    def indices(self, heads: int, start: int, stop: int) -> list[Tensor]:
        """b, h, q_idx and kv_idx of some heads of the first batch entry and some rows, to be broadcast."""
        ranges = ((0, 1), (0, heads), (start, stop), (0, self.cell.S))
        made = [torch.arange(*r, device=self.device, dtype=torch.int32) for r in ranges]
        return [t.view([-1 if d == at else 1 for d in range(4)]) for at, t in enumerate(made)]

    def chunks(self, heads: int) -> Iterator[tuple[int, int]]:
        """Rows from, to."""
        step = max(1, ELEMENTS // (heads * self.cell.S))
        return ((start, min(start + step, self.cell.S)) for start in range(0, self.cell.S, step))

    def area(self) -> int:
        """Attended elements of one head."""
        mask = self.mask_mod()
        if mask is None:
            return self.cell.S**2
        return sum(int(mask(*self.indices(1, *rows)).sum()) for rows in self.chunks(1))

    def compared(self, t: Tensor) -> Tensor:
        """The part that is compared: the first key head of the first batch entry, and the heads that share it."""
        group = self.cell.Hq // self.cell.Hkv
        return t[:1, : group if t.shape[1] == self.cell.Hq else 1].detach()

    def dense(self, dtype: torch.dtype) -> list[Tensor]:
        """out, dq, dk and dv of the compared part, by dense attention with products in `dtype`."""
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        q, k, v = (self.compared(t).to(dtype) for t in self.leaves)
        k, v = k.requires_grad_(), v.requires_grad_()
        dout, rows, sums = self.compared(self.dout).to(dtype), [], [torch.zeros(()), torch.zeros(())]
        for start, stop in self.chunks(q.shape[1]):
            part = q[:, :, start:stop].detach().requires_grad_()
            out = self._rows(part, k, v, self.indices(q.shape[1], start, stop), wide)
            dq, *grads = torch.autograd.grad(out, [part, k, v], dout[:, :, start:stop])
            rows.append((out.detach(), dq))
            sums = [a.to(g.device) + g.double() for a, g in zip(sums, grads, strict=True)]
        return [torch.cat(column, dim=2) for column in zip(*rows, strict=True)] + sums

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, index: list[Tensor], wide: torch.dtype) -> Tensor:
        scores = (q @ k.mT).to(wide) / math.sqrt(q.shape[-1])
        score_mod, mask_mod = self.score_mod(), self.mask_mod()
        if score_mod is not None:
            scores = score_mod(scores, *index)
        if mask_mod is not None:
            scores = scores.masked_fill(~mask_mod(*index), -math.inf)
        return torch.softmax(scores, -1).to(v.dtype) @ v

    def gradients(self, attend: Attend) -> list[Tensor]:
        """out, dq, dk, dv."""
        out = attend(*self.leaves)
        return [out, *torch.autograd.grad(out, self.leaves, self.dout)]


class Judge:
    """Float64, and plain torch in the inputs' precision as the yardstick of an error."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.exact, self.plain = (problem.dense(d) for d in (torch.float64, problem.dout.dtype))

    def errors(self, attend: Attend) -> dict[str, float]:
        """The largest errors of the output and of the gradients, by pass. Raises if one is far beyond the plain error."""
        found = []
        results = map(self.problem.compared, self.problem.gradients(attend))
        for name, value, exact, plain in zip(("out", "dq", "dk", "dv"), results, self.exact, self.plain, strict=True):
            error = (value.double() - exact).abs().max().item()
            rounding = torch.finfo(value.dtype).eps * exact.abs().max().item()
            allowed = 8 * max(rounding, (plain.double() - exact).abs().max().item())
            if not error <= allowed:
                raise ValueError(f"wrong: the error of {name} is {error:.2e}, allowed is {allowed:.2e}")
            found.append(error)
        return {"forward": found[0], "backward": max(found[1:]), "forward_backward": max(found)}


def timed_pass(problem: Problem, attend: Attend, which: str) -> Callable[[], object]:
    """What is timed for a pass. The backward is repeated on one forward, whose graph it keeps."""
    if which == "forward":
        return partial(attend, *problem.leaves)
    if which == "forward_backward":
        return partial(problem.gradients, attend)
    return partial(torch.autograd.grad, attend(*problem.leaves), problem.leaves, problem.dout, retain_graph=True)
