"""Who solves a problem: a table of makers, from a problem to the callable that is timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from gpu_problem import LONG, Attend, Problem
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as peer

import flexattn

Maker = Callable[[Problem], Attend | None]  # None: this variant is none of its own for this problem


def ours(problem: Problem) -> Attend:
    """`flexattn.flex_attention`, not compiled: as a user calls it."""
    cell, score_mod, mask_mod = problem.cell, problem.score_mod(), problem.mask_mod()
    mask = mask_mod and flexattn.create_block_mask(mask_mod, None, None, cell.S, cell.S, problem.device)
    return lambda q, k, v: flexattn.flex_attention(
        q, k, v, score_mod, mask, enable_gqa=cell.Hq != cell.Hkv, backend=problem.backend
    )


def torch_flex(problem: Problem, mode: str | None = None, **kernel_options: bool) -> Attend:
    """PyTorch's `flex_attention`, compiled for this shape; on a CPU, where that has no backward, as it is."""
    cell, score_mod, mask_mod = problem.cell, problem.score_mod(), problem.mask_mod()
    on_gpu = problem.device == "cuda"
    attention = torch.compile(peer.flex_attention, dynamic=False, mode=mode) if on_gpu else peer.flex_attention
    mask = None
    if mask_mod is not None and cell.S < LONG:
        mask = peer.create_block_mask(mask_mod, None, None, cell.S, cell.S, problem.device)
    elif mask_mod is not None:  # its eager create_block_mask would hold S * S numbers; the lists are the same
        mask = flexattn.create_block_mask(mask_mod, None, None, cell.S, cell.S, problem.device).to_torch()
    return lambda q, k, v: attention(
        q,
        k,
        v,
        score_mod=score_mod,
        block_mask=mask,
        enable_gqa=cell.Hq != cell.Hkv,
        kernel_options=kernel_options or None,
    )


def sdpa(backend: SDPBackend, problem: Problem, repeated: bool = False) -> Attend | None:
    """`scaled_dot_product_attention` by one backend, for what needs no mask tensor. `repeated`: key heads are, in the call."""
    causal, group = problem.cell.case == "causal", problem.cell.Hq // problem.cell.Hkv
    if repeated and group == 1:
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if repeated:
            k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=not repeated and group > 1)

    return attend


def sdpa_mask(problem: Problem) -> Attend:
    """`scaled_dot_product_attention` with a mask or a bias tensor, by the backend that PyTorch chooses.

    Key heads are repeated in the call: with enable_gqa only the backend that holds all scores takes a mask tensor.
    """
    bias, group = problem.bias(), problem.cell.Hq // problem.cell.Hkv
    widen = lambda t: t if group == 1 else t.repeat_interleave(group, 1)
    return lambda q, k, v: F.scaled_dot_product_attention(q, widen(k), widen(v), attn_mask=bias)


MAX_AUTOTUNE = "max-autotune-no-cudagraphs"
# A contender has one or more variants; of several, the fastest counts, for each pass.
CONTENDERS: dict[str, dict[str, Maker]] = {
    "flexattn": {"": ours},
    "torch_flex": {"": torch_flex},
    "torch_flex_tuned": {
        "max-autotune": partial(torch_flex, mode=MAX_AUTOTUNE),
        "max-autotune, USE_TMA": partial(torch_flex, mode=MAX_AUTOTUNE, USE_TMA=True),
    },
    "sdpa_flash": {"": partial(sdpa, SDPBackend.FLASH_ATTENTION)},
    "sdpa_cudnn": {  # not every version of PyTorch gives cuDNN grouped heads
        "": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "key heads repeated": partial(sdpa, SDPBackend.CUDNN_ATTENTION, repeated=True),
    },
    "sdpa_mask": {"": sdpa_mask},
}
ABOUT = {
    "torch_flex": "`torch.compile(flex_attention, dynamic=False)` of PyTorch; from S 32768 on with flexattn's block lists",
    "torch_flex_tuned": "the same with `max-autotune-no-cudagraphs`, with and without `USE_TMA`, the faster one",
    "sdpa_flash": "`scaled_dot_product_attention` by FlashAttention-2",
    "sdpa_cudnn": "`scaled_dot_product_attention` by cuDNN; grouped heads as such or repeated, the faster one",
    "sdpa_mask": "`scaled_dot_product_attention` with the mask or bias as a tensor, made beforehand",
}
