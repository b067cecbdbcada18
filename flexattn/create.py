"""From a mask function to its block mask, or to its dense values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import capture
from .block_lists import block_size, has_data
from .block_mask import DEFAULT_BLOCK_SIZE, BlockMask
from .codegen.evaluate import Inputs, evaluate
from .codegen.pipeline import variant
from .codegen.tiles import DEFAULT_MEMORY
from .codegen.trace import positional_count, trace

MaskMod = Callable[..., Tensor]


def _shape(B: int | None, H: int | None, Q_LEN: int, KV_LEN: int) -> tuple[int, int, int, int]:
    shape = (1 if B is None else B, 1 if H is None else H, Q_LEN, KV_LEN)
    for name, n in zip(("B", "H", "Q_LEN", "KV_LEN"), shape, strict=True):
        if not isinstance(n, (int, torch.SymInt)) or n < 0:
            raise ValueError(f"{name} is {n!r}; it must be a size" + (" or None" if name in "BH" else ""))
    return shape


def create_block_mask(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None = None,
    BLOCK_SIZE: int | tuple[int, int] = DEFAULT_BLOCK_SIZE,
    _compile: bool = False,
    separate_full_blocks: bool = True,
    compute_dq_write_order: bool = False,
    dq_kv_order: bool = True,
    *,
    max_memory: int = DEFAULT_MEMORY,
) -> BlockMask:
    """The block mask of a mask function.

    The function is traced once and evaluated on whole ranges of positions. Where the keys of each query are one range
    (causal, windows, prefixes, chunks, documents) lists follow from its limits; else boxes are split where the mask's
    boundary runs, and elements are evaluated only where nothing else decides. Blocks are classified exactly.

    Lists are as wide as the longest row needs (rounded up to a multiple of 16; in compiled code as wide as there are
    key blocks), and B or H of theirs is 1 where the mask does not depend on it, whatever B and H are given.

    Args:
        mask_mod: function `(b, h, q_idx, kv_idx) -> bool` of scalars, True = attend.
        B, H: batch and heads, or None where the mask is the same for all.
        Q_LEN, KV_LEN: lengths; they need not be multiples of the block size.
        device: where the lists live. Default: the current accelerator, else the CPU.
        BLOCK_SIZE: an int, or (queries, keys).
        max_memory: bytes of work memory, besides captured tensors and the lists; 256 MiB by default. Less is slower.
        separate_full_blocks: list full blocks apart, so that their elements are not masked.
        _compile, compute_dq_write_order, dq_kv_order: accepted for PyTorch's sake; without effect.

    Raises:
        TraceError: for a mask that cannot be traced, takes five arguments, or does not return a bool.
        ValueError: for sizes that are not sizes, and for B or H of None where the mask depends on the batch or head.
        IndexError: for a captured tensor that is shorter than the positions it is read at, such as `ids[q_idx]`.

    Example:
        >>> import flexattn
        >>> mask = flexattn.create_block_mask(flexattn.masks.causal_mask, None, None, 256, 256)
        >>> mask.kv_num_blocks.tolist(), mask.full_kv_num_blocks.tolist()
        ([[[1, 1]]], [[[0, 1]]])
    """
    size = block_size(BLOCK_SIZE)
    if not callable(mask_mod):
        raise TypeError(f"mask_mod is a {type(mask_mod).__name__}; pass a function (b, h, q_idx, kv_idx) -> bool")
    shape = _shape(B, H, Q_LEN, KV_LEN)
    like = _empty_on(device)
    if max_memory < 1:
        raise ValueError(f"max_memory is {max_memory!r}; it must be a number of bytes, such as 256 << 20")
    unsaid = B is None, H is None
    found = capture.block_lists(mask_mod, shape, size, like, unsaid, max_memory)
    made = BlockMask((Q_LEN, KV_LEN), found[0], found[1], found[2], found[3], size, mask_mod)
    if not separate_full_blocks:
        both = made.to_dense()
        order = torch.argsort(both, dim=-1, descending=True, stable=True).to(torch.int32)
        made = BlockMask((Q_LEN, KV_LEN), both.sum(-1, dtype=torch.int32), order, None, None, size, mask_mod)
    known = separate_full_blocks and not torch.compiler.is_compiling() and has_data(found[0])
    made.mark(shape[0], shape[1], bool(found[4]) if known else None)
    if 1 in (B, H) and not torch.compiler.is_compiling():
        mask = variant(trace(None, mask_mod, device=like.device).program).mask
        axes = frozenset() if mask is None else mask.axes
        made.only_first = B == 1 and "b" in axes, H == 1 and "h" in axes
    return made


def create_mask(
    mod_fn: Callable[..., Tensor],
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """The dense [B, H, Q_LEN, KV_LEN] values of a mod: bool for a mask_mod; for a score_mod, float32 scores from zeros.

    Which of the two it is, the number of its arguments tells: four or five. B and H of None are 1.

    Example:
        >>> import flexattn
        >>> flexattn.create_mask(flexattn.masks.causal_mask, None, None, 2, 3).int().tolist()
        [[[[1, 0, 0], [1, 1, 0]]]]
    """
    device = _empty_on(device).device
    is_score = positional_count(mod_fn) == 5
    program, captured, ints = trace(mod_fn if is_score else None, None if is_score else mod_fn, device=device)
    parsed = variant(program)
    shape = _shape(B, H, Q_LEN, KV_LEN)
    named = {
        name: torch.arange(n, dtype=torch.int32, device=device).view([-1 if i == d else 1 for i in range(4)])
        for d, (name, n) in enumerate(zip(("b", "h", "q_idx", "kv_idx"), shape, strict=True))
    }
    named["score"] = torch.zeros((), dtype=torch.float32, device=device)
    n = len(captured) - parsed.n_floats
    if not is_score and parsed.mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    root = parsed.score if is_score or parsed.mask is None else parsed.mask
    (values,) = evaluate([root], Inputs(named, captured[:n], captured[n:], ints, device))
    return values.expand(shape).contiguous()


def _empty_on(device: torch.device | str | None) -> Tensor:
    """An empty tensor on a device, by default the current accelerator or else the CPU."""
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    if torch.compiler.is_compiling():
        return torch.empty(0, device=device)
    try:
        return torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # what torch says differs from device to device
        raise ValueError(
            f"device={str(device)!r} cannot be used here: {str(error).splitlines()[0].rstrip('.')}. Write device='cpu', or "
            "leave device out for the current accelerator, else the CPU"
        ) from error
