"""Every error about the arguments of an attention call is raised here, before any work is done."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .block_mask import BlockMask
from .codegen.private import constant_while_compiling, forward_mode_is_on
from .sharded import is_freed

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("auto", "triton", "tiled", "reference")
MAX_HEAD_DIM = 256  # of the fused kernels


def tensors(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Raise `ValueError` unless the three tensors form one attention problem."""
    for t in (query, key, value):
        if not isinstance(t, Tensor) or t.is_nested or t.dim() != 4 or t.dtype not in DTYPES:
            raise _unusable("query" if t is query else "key" if t is key else "value", t)
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value differ in dtype ({query.dtype}, {key.dtype}, {value.dtype}); convert them to one"
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            f"query, key and value are on different devices ({query.device}, {key.device}, {value.device})"
        )
    (B, heads, _, E), (kv_batch, kv_heads, S, kv_E), (v_batch, v_heads, v_S, _) = query.shape, key.shape, value.shape
    if E != kv_E:
        raise ValueError(f"query and key differ in head_dim: {E} and {kv_E}")
    if E == 0:
        raise ValueError("query and key have head_dim 0")
    if kv_batch != v_batch or kv_heads != v_heads or S != v_S:
        raise ValueError(
            f"key and value differ in batch, heads or length: {tuple(key.shape[:3])} and {tuple(value.shape[:3])}"
        )
    if kv_batch not in (B, 1):
        allowed = f"query's, {B}, or 1" if B != 1 else "query's, 1"
        raise ValueError(f"the batch of key and value is {kv_batch}; it must be {allowed}")
    if heads != kv_heads:
        if not enable_gqa:
            raise ValueError(
                f"query has {heads} heads, key and value have {kv_heads}. For grouped-query attention pass enable_gqa=True"
            )
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(f"query's {heads} heads cannot be divided among {kv_heads} key and value heads")


def _unusable(name: str, t: Any) -> Exception:
    """Why one of the tensors cannot be an operand."""
    if not isinstance(t, Tensor):
        return TypeError(f"{name} is a {type(t).__name__}; pass a tensor of shape [batch, heads, length, head_dim]")
    if t.is_nested:
        return NotImplementedError(
            f"{name} is a nested tensor. Pack the sequences into one and keep them apart with a mask instead: "
            "flexattn.masks.document_mask(document_ids)"
        )
    if t.dim() != 4:
        return ValueError(f"{name} has shape {tuple(t.shape)}; it must be [batch, heads, length, head_dim]")
    return ValueError(f"{name} has dtype {t.dtype}; use one of {', '.join(str(d)[6:] for d in DTYPES)}")


def block_mask(mask: Any, query: Tensor, key: Tensor) -> None:
    """Raise unless a block mask was made for this shape and device."""
    if not isinstance(mask, BlockMask):
        hint = ""
        if hasattr(mask, "kv_num_blocks"):
            hint = (
                ". PyTorch's BlockMask converts by flexattn.BlockMask.from_torch(block_mask); a model that calls PyTorch's "
                "flex_attention with it runs here unchanged: with flexattn.integrations.torch_flex.route(): model(...)"
            )
        elif isinstance(mask, Tensor):
            hint = (
                ". A dense boolean tensor is a mask function that reads it: "
                "mask_mod=lambda b, h, q_idx, kv_idx: t[q_idx, kv_idx]"
            )
        elif callable(mask):
            hint = "; a mask function is passed as mask_mod="
        raise TypeError(
            f"block_mask is a {type(mask).__module__}.{type(mask).__name__}, not a flexattn.BlockMask{hint}"
        )
    B, H, L, _ = query.shape
    S = key.shape[2]
    batch, heads = mask.sizes
    # Not `in`: Dynamo before PyTorch 2.15 finds no number among symbolic sizes.
    if batch != 1 and batch != B:
        raise ValueError(_wrong_size("B", "batch", batch, B))
    if heads != 1 and heads != H:
        raise ValueError(_wrong_size("H", "heads", heads, H))
    if mask.only_first != (False, False):
        for name, size, first, axis in zip("BH", query.shape, mask.only_first, ("b", "h"), strict=False):
            if first and size > 1:
                raise ValueError(
                    f"block_mask was made with {name}=1 of a mask that depends on {axis}, and query has {size}: it would have "
                    f"the blocks of the first and the elements of each. Build it with create_block_mask(..., {name}={size})"
                )
    rows, columns = mask.seq_lengths
    if rows != L or columns != S:
        raise ValueError(
            f"block_mask was made for lengths (Q_LEN, KV_LEN) = {tuple(mask.seq_lengths)}, query and key have {(L, S)}. "
            "Build it for these lengths, or crop it with block_mask._adjust(Q_LEN, KV_LEN)"
        )
    if mask.kv_num_blocks.device != query.device:
        raise ValueError(
            f"block_mask is on {mask.kv_num_blocks.device}, query on {query.device}; move it with "
            f"block_mask.to({str(query.device)!r})"
        )


def _wrong_size(name: str, axis: str, have: int, size: int) -> str:
    return (
        f"block_mask has {name}={have} but query has {axis} {size}. A mask's {name} must equal query's or be 1; "
        f"build it with create_block_mask(..., {name}={size}) or {name}=None"
    )


def captured(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Raise `ValueError` for a captured tensor with dimensions on another device than the query, or without memory."""
    for t in tensors:
        if type(t) is torch.nn.Parameter and is_freed(t):
            raise ValueError(
                f"a mod captures a parameter of shape {tuple(t.shape)} whose memory is freed. Under fully_shard, parameters "
                "are whole while the forward of the module that was given to fully_shard runs; that of a mod ends before "
                "attention begins. Give it the module that calls flex_attention instead: fully_shard(layer)"
            )
        if t.dim() and t.device != device:
            raise ValueError(
                f"a mod captures a tensor of shape {tuple(t.shape)} on {t.device}, query is on {device}; move it once: "
                f"t = t.to({str(device)!r})"
            )


NO_FORWARD_MODE = (
    "flex_attention has no forward-mode derivative (jvp, jacfwd, hessian). Use reverse mode: torch.autograd.grad, "
    "torch.func.vjp or jacrev; or backend='reference', which is dense and has every derivative"
)


def no_forward_mode(tensors: Sequence[Tensor]) -> None:
    """Raise `NotImplementedError` for a tensor with a tangent: the result would silently have none."""
    if not forward_mode_is_on() or torch.compiler.is_compiling():
        return
    if any(torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(NO_FORWARD_MODE)


def choices(block_mask: Any, mask_mod: Any, return_lse: bool, return_aux: Any, backend: str, scale: Any) -> None:
    """Raise for arguments that exclude each other, and for unknown names."""
    if block_mask is not None and mask_mod is not None:
        raise ValueError(
            "both block_mask and mask_mod are given. A block mask brings its own mask_mod: pass one of the two, or build "
            "the block mask from and_masks(a, b)"
        )
    if return_lse and return_aux is not None:
        raise ValueError("both return_lse and return_aux are given; write return_aux=AuxRequest(lse=True) alone")
    if return_aux is not None and not (hasattr(return_aux, "lse") and hasattr(return_aux, "max_scores")):
        raise TypeError(
            f"return_aux is a {type(return_aux).__name__}; say which outputs to return: return_aux=AuxRequest(lse=True)"
        )
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(map(repr, BACKENDS))}")
    if scale is not None and not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(
            f"scale is a {type(scale).__name__}; pass a Python number, or multiply the score by the tensor in a score_mod: "
            "lambda score, b, h, q_idx, kv_idx: score * scale"
        )


def triton_refusal(query: Tensor, value: Tensor) -> str:
    """Why the Triton kernels cannot take these tensors, as the rest of a sentence; empty if they can."""
    if sys.platform != "linux":
        return f"needs Triton, which does not exist for {sys.platform}"
    if query.device.type == "cpu":
        wanted = "runs on GPUs; on a CPU it needs Triton's interpreter"
        if importlib.util.find_spec("numpy") is None:  # asked first: without it the interpreter cannot be imported
            return f"{wanted}, which needs numpy: pip install numpy, and set TRITON_INTERPRET=1 before Python starts"
        if not _interpreted():
            return f"{wanted}: set TRITON_INTERPRET=1 before Python starts"
    elif query.device.type != "cuda":
        return f"does not know the device {query.device.type}"
    if query.dtype is torch.float64:
        return "computes scores in float32, not in float64"
    if max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        return f"takes head dimensions up to {MAX_HEAD_DIM}, not {query.shape[-1]} and {value.shape[-1]}"
    return ""


@constant_while_compiling
def _interpreted() -> bool:
    from .backends.target import interpreted

    return interpreted()
