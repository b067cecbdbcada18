"""Classification of the tiles of a mask: EMPTY, PARTIAL or FULL, one for every (b, h, query block, key block).

The mask is evaluated element by element, a bounded number of elements at a time, never all of them at once.
"""

from __future__ import annotations

import itertools
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
    block_q, block_kv = min(block_q, Q), min(block_kv, KV)
    if B * H * block_q * block_kv > _CHUNK:
        for r, c in itertools.product(range(rows), range(columns)):
            spans = ((r * block_q, min((r + 1) * block_q, Q)), (c * block_kv, min((c + 1) * block_kv, KV)))
            classes[:, :, r, c] = _classify_large(variant, base, (B, H), spans, device)
        return classes
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


def _classify_large(
    variant: Variant,
    base: Inputs,
    lead: tuple[int, int],
    spans: tuple[tuple[int, int], tuple[int, int]],
    device: torch.device,
) -> Tensor:
    """The class of one block that is too large to be evaluated at once, [B', H']."""
    assert variant.mask is not None
    (q_start, q_stop), (kv_start, kv_stop) = spans
    wide = max(1, min(kv_stop - kv_start, _CHUNK // (lead[0] * lead[1])))
    tall = max(1, _CHUNK // (lead[0] * lead[1] * wide))
    attended = torch.zeros(lead, dtype=torch.int64, device=device)
    for q in range(q_start, q_stop, tall):
        for kv in range(kv_start, kv_stop, wide):
            ends = min(q + tall, q_stop), min(kv + wide, kv_stop)
            q_idx = torch.arange(q, ends[0], dtype=torch.int32, device=device).view(-1, 1)
            kv_idx = torch.arange(kv, ends[1], dtype=torch.int32, device=device)
            (keep,) = evaluate([variant.mask], base.fork({"q_idx": q_idx, "kv_idx": kv_idx}))
            attended += keep.expand(*lead, ends[0] - q, ends[1] - kv).sum((2, 3))
    area = (q_stop - q_start) * (kv_stop - kv_start)
    return (attended > 0).to(torch.int8) + (attended == area).to(torch.int8)


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
