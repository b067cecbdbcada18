"""Who is timed by `flexattn bench`: a table of makers, from a problem to the callable that solves it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as peer

from flexattn.api import flex_attention
from flexattn.backends.tiled import additive_bias
from flexattn.block_mask import BlockMask
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace
from flexattn.create import create_block_mask, create_mask
from flexattn.debug import debug_mode

from .failures import reading
from .pairs import Pair

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class NotRun(Exception):
    """Why a contender has no part in a problem."""


class Problem(NamedTuple):
    """What is solved.

    Attributes:
        mods: the score_mod and the mask.
        sizes: (B, H, L, E).
        dtype, device: of the query, as words.
        compiles: whether PyTorch's flex_attention is compiled here.
        block: the mask's lists, or None.
        query, key, value: [B, H, L, E].
    """

    mods: Pair
    sizes: tuple[int, int, int, int]
    dtype: str
    device: str
    compiles: bool
    block: BlockMask | None
    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def of(cls, mods: Pair, sizes: tuple[int, int, int, int], dtype: str, device: str, compiles: bool) -> Problem:
        """A problem with random operands. Raises `Mistake` for a mod that does not fit the sizes."""
        B, H, L, _ = sizes
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(sizes, generator=generator).to(device, getattr(torch, dtype)) for _ in range(3))
        with reading(mods.text):
            block = mods.block_mask
            if block is not None:
                block = block.to(device)
            elif mods.mask_mod is not None:
                block = create_block_mask(mods.mask_mod, B, H, L, L, device)
            with debug_mode():  # refuses what cannot be traced, and what reads beyond a tensor
                flex_attention(q, k, v, mods.score_mod, block)
        return cls(mods, sizes, dtype, device, compiles, block, q, k, v)


def _ours(problem: Problem) -> Attend:
    score_mod, block = problem.mods.score_mod, problem.block
    return lambda q, k, v: flex_attention(q, k, v, score_mod, block)


def _sdpa(problem: Problem) -> Attend:
    """`scaled_dot_product_attention`, with mask and bias as one tensor."""
    B, H, L, _ = problem.sizes
    need, have = 8 * B * H * L * L, _free_memory(problem.device)  # the bias, and the scores where they are kept
    if need > have // 2:
        raise NotRun(f"not run: the dense mask and scores need {need / 2**30:.1f} GiB, {have / 2**30:.1f} GiB are free")
    bias = None
    if problem.mods.score_mod is not None:
        parsed = variant(trace(problem.mods.score_mod, None).program)
        if parsed.modifies_score and additive_bias(parsed) is None:
            raise NotRun("not run: the mod does more than add a bias, which is all that SDPA takes")
        bias = create_mask(problem.mods.score_mod, B, H, L, L, problem.device).to(problem.query.dtype)
    if problem.mods.mask_mod is not None:
        keep = create_mask(problem.mods.mask_mod, B, H, L, L, problem.device)
        bias = keep if bias is None else bias.masked_fill(~keep, -torch.inf)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _torch_flex(problem: Problem) -> Attend:
    """PyTorch's `flex_attention`, compiled for this shape, with the same lists of blocks."""
    if not problem.compiles:
        raise NotRun("not run: it is compiled on GPUs; --compile does so on a CPU, where it has no backward")
    attend = torch.compile(peer.flex_attention, dynamic=False)
    score_mod, block = problem.mods.score_mod, None if problem.block is None else problem.block.to_torch()
    return lambda q, k, v: attend(q, k, v, score_mod=score_mod, block_mask=block)


OURS, DENSE = "flexattn", "sdpa, dense mask"
CONTENDERS: dict[str, Callable[[Problem], Attend]] = {
    OURS: _ours,
    DENSE: _sdpa,
    "torch flex_attention, compiled": _torch_flex,
}


def _free_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not every system tells
        return 4 << 30
