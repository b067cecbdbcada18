"""Classification of the tiles of a mask: EMPTY, PARTIAL or FULL, one for every (b, h, query block, key block).

The mask is evaluated element by element, a bounded number of elements at a time, never all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .evaluate import Inputs, evaluate
from .pipeline import Variant

EMPTY, PARTIAL, FULL = 0, 1, 2

_CHUNK = 1 << 22  # elements evaluated at once


def classify(
    variant: Variant,
    captured: Sequence[Tensor],
    ints: Sequence[int],
    shape: tuple[int, int, int, int],
    block_size: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """The int8 class of every tile, [B', H', ceil(Q / block_q), ceil(KV / block_kv)].

    `shape` is (B, H, Q, KV); `captured` ends with the variant's run-time floats. B' and H' are 1 where the mask does not
    depend on the batch or the head.
    """
    B, H, Q, KV = shape
    block_q, block_kv = block_size
    rows, columns = -(-Q // block_q), -(-KV // block_kv)
    axes = frozenset() if variant.mask is None else variant.mask.axes
    B, H = (B if "b" in axes else 1), (H if "h" in axes else 1)
    classes = torch.full((B, H, rows, columns), FULL, dtype=torch.int8, device=device)
    if variant.mask is None or classes.numel() == 0:
        return classes
    n = len(captured) - variant.n_floats
    axis = partial(torch.arange, dtype=torch.int32, device=device)
    index = {"b": axis(B).view(B, 1, 1, 1), "h": axis(H).view(1, H, 1, 1)}
    base = Inputs(index, captured[:n], captured[n:], ints, device)
    # Whole rows of blocks while they fit, else pieces of one row.
    wide = max(1, min(columns, _CHUNK // (B * H * block_q * block_kv)))
    tall = max(1, min(rows, _CHUNK // (B * H * block_q * KV))) if wide == columns else 1
    for r in range(0, rows, tall):
        q = axis(r * block_q, min((r + tall) * block_q, Q))
        for c in range(0, columns, wide):
            kv = axis(c * block_kv, min((c + wide) * block_kv, KV))
            (keep,) = evaluate([variant.mask], base.fork({"q_idx": q.view(-1, 1), "kv_idx": kv}))
            keep = keep.expand(B, H, len(q), len(kv))
            classes[:, :, r : r + tall, c : c + wide] = _classify_chunk(keep, block_q, block_kv)
    return classes


def _classify_chunk(keep: Tensor, block_q: int, block_kv: int) -> Tensor:
    """Classes of the blocks of one chunk that starts on a block boundary; its last blocks may be short."""
    attended = _block_sums(_block_sums(keep, block_kv, 3), block_q, 2)
    q_sizes = _sizes(keep.shape[2], block_q, keep.device)
    kv_sizes = _sizes(keep.shape[3], block_kv, keep.device)
    area = q_sizes.view(-1, 1) * kv_sizes
    return (attended > 0).to(torch.int8) + (attended == area).to(torch.int8)


def _block_sums(x: Tensor, block: int, dim: int) -> Tensor:
    short = -x.shape[dim] % block
    if short:
        pad = [0, 0] * (x.dim() - 1 - dim) + [0, short]
        x = torch.nn.functional.pad(x, pad)
    return x.unflatten(dim, (-1, block)).sum(dim + 1, dtype=torch.int32)


def _sizes(length: int, block: int, device: torch.device) -> Tensor:
    starts = torch.arange(0, length, block, device=device)
    return (length - starts).clamp_max(block)
