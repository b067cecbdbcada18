"""`flex_attention`: validate, build what is missing, call the operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import batch_invariant as batch_invariance
from . import capture, validate
from .autocast import autocast
from .backends.invariant import OPTION
from .block_mask import BlockMask
from .documents import Documents
from .kernel_options import check_kernel_options, options_text
from .mask_cache import cached_block_mask
from .notices import say_once


class AuxRequest(NamedTuple):
    """Which auxiliary outputs `flex_attention` should return."""

    lse: bool = False
    max_scores: bool = False


class AuxOutput(NamedTuple):
    """Auxiliary outputs, [B, Hq, L]; None where not requested.

    `lse` is the natural logarithm of the softmax denominator, differentiable, -inf for a row that attends to nothing.
    `max_scores` is the largest modified score of each row, not differentiable. Both are float32, or float64 for float64
    inputs.
    """

    lse: Tensor | None = None
    max_scores: Tensor | None = None


ScoreMod = Callable[..., Tensor]
MaskMod = Callable[..., Tensor]


@overload
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = ...,
    block_mask: BlockMask | None = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    return_lse: Literal[False] = ...,
    kernel_options: Mapping[str, Any] | None = ...,
    *,
    return_aux: None = ...,
    mask_mod: MaskMod | None = ...,
    backend: str = ...,
    batch_invariant: bool | Documents = ...,
) -> Tensor: ...


@overload
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = ...,
    block_mask: BlockMask | None = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_lse: Literal[True],
    kernel_options: Mapping[str, Any] | None = ...,
    return_aux: None = ...,
    mask_mod: MaskMod | None = ...,
    backend: str = ...,
    batch_invariant: bool | Documents = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = ...,
    block_mask: BlockMask | None = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    return_lse: bool = ...,
    kernel_options: Mapping[str, Any] | None = ...,
    *,
    return_aux: AuxRequest,
    mask_mod: MaskMod | None = ...,
    backend: str = ...,
    batch_invariant: bool | Documents = ...,
) -> tuple[Tensor, AuxOutput]: ...


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
    mask_mod: MaskMod | None = None,
    backend: str = "auto",
    batch_invariant: bool | Documents = False,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
    """Softmax attention whose scores and mask are given by Python functions of one element.

    For each batch entry b and query head h, with the key/value head `h // (Hq // Hkv)`::

        score  = score_mod(scale * <query[q_idx], key[kv_idx]>, b, h, q_idx, kv_idx)
        weight = softmax over the kv_idx with mask_mod(b, h, q_idx, kv_idx) of score
        out    = sum over kv_idx of weight * value[kv_idx]

    Neither the scores nor the weights are stored: memory is linear in the sequence length, forward and backward.

    Args:
        query: [B, Hq, L, E], float16, bfloat16, float32 or float64. Any strides.
        key: [B or 1, Hkv, S, E], the query's dtype. A batch of 1 is shared.
        value: [B or 1, Hkv, S, Ev]. Ev may differ from E.
        score_mod: function `(score, b, h, q_idx, kv_idx) -> score` of scalars, traced once. `score` is float32
            (float64 for float64 inputs), the indices are int32, h is the query head. None is the identity.
        block_mask: which blocks are attended, and the mask inside partial ones. Its lists are what counts: a block
            that is not listed is not attended, a full block is not masked. Batch and head sizes must be 1 or query's.
        scale: factor of the dot products. Default 1 / sqrt(E).
        enable_gqa: allow Hq to be a multiple of Hkv.
        return_lse: also return the lse, [B, Hq, L]. Kept for PyTorch's sake; prefer `return_aux`.
        kernel_options: tuning of GPU kernels, see `flexattn.kernel_options.OPTIONS`; what is pinned and cannot be followed is
            an error there, and has no effect on a CPU. With {"AUTOTUNE": True} the fastest configuration is found by timing,
            and kept on disk.
        return_aux: which auxiliary outputs to return.
        mask_mod: function `(b, h, q_idx, kv_idx) -> bool`, True = attend. Its block mask is built for this shape and
            cached; give either this or `block_mask`.
        backend: "triton" (fused kernels; CUDA, ROCm, and the CPU under TRITON_INTERPRET=1), "tiled" (torch operators,
            linear memory, any device), "reference" (dense, for checking), or "auto", the fastest one for the device.
        batch_invariant: True: what a batch entry gets is the same, to the bit, whatever the other entries and however many.
            The `Documents` of packed rows: besides, what a document gets is what it gets alone; attention stays within
            documents, and `mask_mod` says the rest. Slower; see docs/numerics.md for what it promises.

    Returns:
        out [B, Hq, L, Ev] in the query's dtype and order of dimensions; `(out, lse)` with `return_lse`;
        `(out, AuxOutput)` with `return_aux`. A row that attends to nothing has output 0, lse -inf and zero gradients.
        Gradients flow to query, key, value and every captured floating-point tensor, through `out` and `lse`.

    Query, key and value may be DTensors, sharded along batch, heads or queries: see docs/distributed.md.

    Raises:
        ValueError, TypeError: for tensors, masks or options that do not fit together.
        TraceError: for a mod that cannot be traced; says which line and what to write instead.

    The interface is that of `torch.nn.attention.flex_attention`; the method is FlashAttention-2 (Dao, 2023).

    Example:
        >>> import torch, flexattn
        >>> q, k, v = (torch.randn(1, 4, 256, 32) for _ in range(3))
        >>> slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
        >>> def alibi(score, b, h, q_idx, kv_idx):
        ...     return score + slopes[h] * (kv_idx - q_idx)
        >>> def causal(b, h, q_idx, kv_idx):
        ...     return q_idx >= kv_idx
        >>> out = flexattn.flex_attention(q, k, v, score_mod=alibi, mask_mod=causal)
        >>> out.shape
        torch.Size([1, 4, 256, 32])
    """
    validate.choices(block_mask, mask_mod, return_lse, return_aux, backend, scale)
    query, key, value = autocast(query, key, value)
    validate.tensors(query, key, value, enable_gqa)
    options = check_kernel_options(kernel_options)
    given, call = query, None
    if batch_invariant is not False:
        batch_invariance.check(batch_invariant, query, key, block_mask)
        options = check_kernel_options({**options, OPTION: True})
        call = batch_invariance.arranged(query, key, value, score_mod, mask_mod, block_mask, batch_invariant)
        if mask_mod is not None and not torch.compiler.is_compiling():  # positions from tables hide what the mask reads
            capture.check_mask_reach(mask_mod, (*query.shape[:3], key.shape[2]), query.device)
        query, key, value, score_mod, mask_mod, _ = call
    if mask_mod is not None:
        block_mask = cached_block_mask(mask_mod, query, key, in_advance=call is None)
    lists: tuple[Tensor, ...] = ()
    block_size = (128, 128)
    if block_mask is not None:
        validate.block_mask(block_mask, query, key)
        lists = block_mask.kv_lists()
        block_size = block_mask.BLOCK_SIZE
        if call is None and not torch.compiler.is_compiling() and block_mask.contiguous:
            options.setdefault("BLOCKS_ARE_CONTIGUOUS", True)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    results = capture.attention(
        query,
        key,
        value,
        score_mod,
        None if block_mask is None else block_mask.mask_mod,
        lists,
        block_size,
        scale,
        choose_backend(backend, query, value),
        options_text(options),
    )
    out, lse, max_scores = results if call is None else call.back(given, results)
    if return_aux is not None:
        aux = AuxOutput(lse if return_aux.lse else None, max_scores if return_aux.max_scores else None)
        return out, aux
    return (out, lse) if return_lse else out


def choose_backend(backend: str, query: Tensor, value: Tensor) -> str:
    """The backend to use. Raises `ValueError` if the caller chose one that cannot do this."""
    if backend in ("tiled", "reference"):
        return backend
    if backend == "auto" and query.device.type in ("cpu", "meta"):
        return "tiled"
    lacking = validate.triton_refusal(query, value)
    if backend == "triton" and lacking:
        raise ValueError(f"backend='triton' {lacking}. Use backend='tiled', or leave the choice to backend='auto'")
    if lacking and not torch.compiler.is_compiling():
        say_once(
            f"flex_attention runs by torch operators (backend 'tiled'), since the fused kernel {lacking}: memory is "
            "linear, but it is slower. Pass backend='tiled' to accept this without a warning."
        )
    return "tiled" if lacking else "triton"
