"""Attention on a GPU where sizes are large: long sequences, many heads, tensors that 32-bit offsets do not reach."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from assertions import assert_within_budget
from gpu.cases import DEVICE, Case, assert_results, assert_right, qkv
from torch import Tensor

from flexattn import BlockMask, and_masks, create_block_mask, flex_attention, masks, mods

LONG = 65536
BEYOND = 2**24 + 5  # times a head size of 128: more than 2**31 elements
GIB = 2**30


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def anything(t: Tensor) -> bool:
    """Whether an element is not zero; in parts that every operator of torch can index."""
    return any(bool(part.any()) for part in t.split(1 << 22, dim=2))


def test_a_sequence_of_8192_is_right_to_the_last_element() -> None:
    slopes = mods.alibi_slopes(8, DEVICE)
    case = Case(*qkv(1, 8, 2, L=8192, E=128), score=mods.alibi, captured=(slopes,), mask=masks.causal_mask)
    assert_right(case)


def test_a_sequence_of_8192_is_right_without_a_mask() -> None:
    assert_right(Case(*qkv(1, 4, L=8192, dtype=torch.float16)))


@pytest.mark.parametrize("kind", ["sliding window", "documents"])
def test_a_sequence_of_65536_is_right_to_the_last_element(kind: str) -> None:
    ids = (torch.rand(LONG, device=DEVICE) < 40 / LONG).cumsum(0)
    mask = masks.sliding_window(1000) if kind == "sliding window" else masks.document_mask(ids)
    mask = and_masks(mask, masks.causal_mask)
    block_mask = create_block_mask(mask, None, None, LONG, LONG, DEVICE)
    assert_right(Case(*qkv(1, 2, 1, L=LONG), mask=mask, block_mask=block_mask))


def test_more_heads_than_a_grid_axis_has_places_are_right() -> None:
    B, H = 8200, 8
    assert B * H > 65535
    case = Case(*qkv(B, H, L=17, E=16), mask=masks.causal_mask)
    whole = case.run()
    for part in (slice(0, B // 2), slice(B // 2, B)):
        half = Case(case.query[part], case.key[part], case.value[part], mask=case.mask)
        half.dout, half.dlse = case.dout[part], case.dlse[part]
        assert_results(half, {name: t[part] for name, t in whole.items()})


def test_the_last_keys_of_a_tensor_of_more_than_two_to_the_31_elements_are_attended() -> None:
    if torch.cuda.mem_get_info()[0] < 60 * GIB:
        pytest.skip("needs 60 GiB of free memory on the GPU")
    E, last = 128, BEYOND // 128
    first, tail = slice(0, 128), slice((last - 1) * 128, BEYOND)  # the listed keys
    at = torch.cat([torch.arange(part.start, part.stop, device=DEVICE) for part in (first, tail)])
    q, k_listed, v_listed = qkv(1, 1, L=64, S=len(at), E=E)
    k, v = (torch.full((1, 1, BEYOND, E), 3.0, dtype=q.dtype, device=DEVICE) for _ in range(2))
    for whole, listed in ((k, k_listed), (v, v_listed)):
        whole[:, :, first], whole[:, :, tail] = listed[:, :, :128], listed[:, :, 128:]
    block_mask = BlockMask.from_kv_blocks(
        torch.full((1, 1, 1), 3, dtype=torch.int32, device=DEVICE),
        torch.tensor([last, 0, last - 1], dtype=torch.int32, device=DEVICE).view(1, 1, 1, 3),
        mask_mod=lambda b, h, q_idx, kv_idx: (q_idx + kv_idx) % 3 != 0,
        seq_lengths=(64, BEYOND),
    )
    case = Case(q, k, v, block_mask=block_mask)
    results = case.run()
    for name in ("dk", "dv"):
        whole = results[name]
        results[name] = torch.cat([whole[:, :, first], whole[:, :, tail]], dim=2)
        whole[:, :, first], whole[:, :, tail] = 0, 0
        assert not anything(whole), f"{name} of keys that are not attended"
    small = Case(q, k_listed, v_listed, mask=lambda b, h, q_idx, kv_idx: (q_idx + at[kv_idx]) % 3 != 0)
    small.dout, small.dlse = case.dout, case.dlse
    assert_results(small, results)


def test_the_last_rows_of_a_query_of_more_than_two_to_the_31_elements_are_right() -> None:
    if torch.cuda.mem_get_info()[0] < 60 * GIB:
        pytest.skip("needs 60 GiB of free memory on the GPU")
    E, S, rows = 128, 100, 300
    q_last, k, v = qkv(1, 1, L=rows, S=S, E=E)
    q = torch.full((1, 1, BEYOND, E), 0.5, dtype=k.dtype, device=DEVICE)
    q[:, :, -rows:] = q_last
    dout = torch.zeros_like(q)
    last = Case(q_last, k, v)
    last.dlse.zero_()
    dout[:, :, -rows:] = last.dout  # no other row has a part in dk and dv
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = flex_attention(*leaves, return_lse=True)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    assert not anything(dq[:, :, :-rows])
    found = {"out": out[:, :, -rows:], "lse": lse[:, :, -rows:], "dq": dq[:, :, -rows:], "dk": dk, "dv": dv}
    exact, plain = last.run("reference", torch.float64), last.dense(q.dtype)[0]
    for name, value in found.items():
        stored = q.dtype if name.startswith("d") else value.dtype
        assert_within_budget(value, exact[name], plain[name], name, stored)
