"""The inputs and the mods of a cell."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from gpu_suites import Cell
from torch import Tensor

import flexattn

LONG = 32768  # sequences from here on have longer windows and more documents
CAP, PREFIX = 30.0, 1024
ELEMENTS = 1 << 26  # scores that are held at a time

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Mod = Callable[..., Tensor]


class Problem:
    """Inputs of a cell, `randn`, and its mods, which hold tensors on the same device.

    Attributes:
        leaves: query, key and value, which require grad.
        dout: gradient of the output.
        backend: flexattn's; "triton" on a CPU where Triton's interpreter is on.
    """

    def __init__(self, cell: Cell, device: str) -> None:
        torch.manual_seed(0)
        self.cell, self.device = cell, device
        self.backend = "triton" if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" else "auto"
        query, key = (cell.B, cell.Hq, cell.S, cell.D), (cell.B, cell.Hkv, cell.S, cell.D)
        dtype = getattr(torch, cell.dtype)
        self.leaves = [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in (query, key, key)]
        self.dout = torch.randn(query, dtype=dtype, device=device)
        self.slopes = flexattn.mods.alibi_slopes(cell.Hq, device)
        self.table = torch.randn(cell.Hq, 2 * cell.S - 1).to(device) if cell.case == "relative_bias" else None
        long = cell.S >= LONG
        self.window = min(4096 if long else 1024, cell.S // 2)
        self.prefix = min(PREFIX, cell.S // 2)
        count = 16 if long else 12
        cuts = torch.randperm(cell.S - 1)[: count - 1].sort().values + 1  # documents of uneven lengths
        self.documents = torch.bucketize(torch.arange(cell.S), cuts, right=True).to(device)
        self.setting = {
            "softcap": f"causal, cap {CAP:g}, exact tanh",
            "sliding_window": f"window {self.window}",
            "document": f"{count} documents, causal",
            "prefix_lm": f"prefix {self.prefix}",
            "relative_bias": "causal, a table of float32",
            "alibi": "causal",
        }.get(cell.case)

    def mask_mod(self) -> Mod | None:
        documents, window, prefix = self.documents, self.window, self.prefix
        masks: dict[str, Mod | None] = {
            "noop": None,
            "sliding_window": lambda b, h, q, k: (q >= k) & (q - k < window),
            "document": lambda b, h, q, k: (documents[q] == documents[k]) & (q >= k),
            "prefix_lm": lambda b, h, q, k: (k < prefix) | (q >= k),
        }
        return masks.get(self.cell.case, lambda b, h, q, k: q >= k)

    def score_mod(self) -> Mod | None:
        slopes, table, last = self.slopes, self.table, self.cell.S - 1
        mods: dict[str, Mod] = {
            "alibi": lambda s, b, h, q, k: s + slopes[h] * (k - q),
            "softcap": lambda s, b, h, q, k: CAP * torch.tanh(s / CAP),
            "relative_bias": lambda s, b, h, q, k: s + table[h, k - q + last],  # type: ignore[index]
        }
        return mods.get(self.cell.case)

    def bias(self) -> Tensor:
        """What scaled_dot_product_attention takes as attn_mask, made some rows at a time: boolean, or to be added."""
        mask_mod, score_mod = self.mask_mod(), self.score_mod()
        assert mask_mod is not None
        heads, parts = 1 if score_mod is None else self.cell.Hq, []
        for rows in chunks(torch.arange(self.cell.S), heads * self.cell.S):
            index = self.index(range(heads), rows)
            part = mask_mod(*index)
            if score_mod is not None:
                added = score_mod(torch.zeros((), device=self.device), *index)
                part = added.masked_fill(~part, -torch.inf).to(self.dout.dtype)
            parts.append(part)
        return torch.cat(parts, 2)

    def index(self, heads: range, rows: Tensor) -> list[Tensor]:
        """b, h, q_idx and kv_idx of some heads of the last batch entry and some rows, to be broadcast."""
        B, S = self.cell.B, self.cell.S
        ranges = (torch.arange(B - 1, B), torch.arange(heads.start, heads.stop), rows, torch.arange(S))
        return [
            t.to(self.device, torch.int32).view([-1 if d == at else 1 for d in range(4)]) for at, t in enumerate(ranges)
        ]

    def area(self) -> int:
        """Attended elements of one head."""
        mask, S = self.mask_mod(), self.cell.S
        if mask is None:
            return S**2
        return sum(int(mask(*self.index(range(1), rows)).sum()) for rows in chunks(torch.arange(S), S))

    def block_area(self) -> int:
        """Elements of one head in blocks that are not empty, of 128 x 128."""
        mask, S = self.mask_mod(), self.cell.S
        if mask is None:
            return S**2
        made = flexattn.create_block_mask(mask, None, None, S, S, self.device)
        return int(made.kv_num_blocks.sum() + made.full_kv_num_blocks.sum()) * 128**2

    def gradients(self, attend: Attend, dout: Tensor | None = None) -> list[Tensor]:
        """out, dq, dk, dv."""
        out = attend(*self.leaves)
        return [out, *torch.autograd.grad(out, self.leaves, self.dout if dout is None else dout)]


def chunks(rows: Tensor, elements: int) -> Iterator[Tensor]:
    """The rows, as many at a time as fit, of so many elements each."""
    return iter(rows.split(max(1, ELEMENTS // elements)))
