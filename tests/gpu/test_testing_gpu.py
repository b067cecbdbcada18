"""The tools of `flexattn.testing` on a GPU: what they pass, and that they find what is planted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flexattn
from flexattn import Documents, masks, mods
from flexattn.testing import (
    Sizes,
    assert_causal,
    assert_matches_reference,
    assert_no_leak,
    check_laws,
    gradcheck,
    mask_diff,
)

DEVICE = "cuda"
HALVES = [torch.bfloat16, torch.float16]


def learned(heads: int = 4) -> tuple[Tensor, Any]:
    """A bias of each head and distance, and the mod that adds it."""
    table = (torch.randn(heads, 512, device=DEVICE) / 4).requires_grad_()
    return table, lambda score, b, h, q_idx, kv_idx: score + table[h, q_idx - kv_idx + 256]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_kernels_match_the_reference(dtype: torch.dtype) -> None:
    slopes = mods.alibi_slopes(4, DEVICE)
    for mod in (None, mods.softcap(20.0), lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx)):
        for shape in (Sizes(), Sizes(1, 4, 4, 250, 250, 128, 64)):
            assert_matches_reference(mod, masks.causal_mask, shape=shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_gradients_of_a_learned_table_match_the_reference(dtype: torch.dtype) -> None:
    _, mod = learned()
    assert_matches_reference(mod, masks.sliding_window(100), dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", HALVES)
def test_pytorchs_own_attention_matches_the_reference(dtype: torch.dtype) -> None:
    attention = torch.nn.functional.scaled_dot_product_attention
    assert_matches_reference(attention=attention, dtype=dtype, device=DEVICE, shape=Sizes(2, 4, 4, 200, 200, 64, 64))


def test_a_kernel_that_drops_the_last_tile_is_found() -> None:
    def drops(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        whole = max(64, key.shape[2] // 64 * 64)
        return flexattn.flex_attention(query, key[:, :, :whole], value[:, :, :whole])

    with pytest.raises(AssertionError, match=r"S=65, .*smallest that fails"):
        assert_matches_reference(attention=drops, dtype=torch.bfloat16, device=DEVICE, shape=Sizes(1, 2, 2, 32, 200))


@pytest.mark.parametrize("dtype", HALVES)
def test_documents_do_not_see_each_other(dtype: torch.dtype) -> None:
    packed = Documents.from_lengths([130, 70, 1, 99]).to(DEVICE)
    mask = packed.mask(masks.causal_mask)
    assert_no_leak(mask, packed, dtype=dtype, device=DEVICE, head_dim=64)
    with pytest.raises(AssertionError, match="see document 0"):
        assert_no_leak(masks.causal_mask, packed, dtype=dtype, device=DEVICE)


def test_a_layer_without_its_mask_is_not_causal() -> None:
    def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flexattn.flex_attention(query, key, value)

    with pytest.raises(AssertionError, match="query 0 sees key 1"):
        assert_causal(attention=layer, shape=(1, 2, 96, 96), device=DEVICE, dtype=torch.bfloat16)


def test_masks_that_read_tensors_of_the_gpu_are_compared_there() -> None:
    ids = torch.arange(4096, device=DEVICE) // 512
    first = masks.and_masks(masks.document_mask(ids), masks.causal_mask)
    second = masks.and_masks(masks.causal_mask, masks.document_mask(ids.clone()))
    assert mask_diff(first, second, 4096).proved
    assert mask_diff(first, masks.causal_mask, 4096).count == 8 * 7 // 2 * 512 * 512


def test_laws_hold_for_mods_that_read_tensors_of_the_gpu() -> None:
    _, mod = learned()
    failed = [(c.name, c.error) for c in check_laws(mod, masks.causal_mask) if isinstance(c.error, AssertionError)]
    assert failed == []
    gradcheck(mod, masks.causal_mask)


def test_an_element_is_inspected_where_its_tensors_are() -> None:
    query, key, value = (torch.randn(1, 4, 200, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    seen = flexattn.inspect(query, key, value, mods.softcap(20.0), masks.causal_mask, h=1, q_idx=150)
    out = seen.weight @ value[0, 1].double()
    exact = flexattn.flex_attention(
        query.double(), key.double(), value.double(), mods.softcap(20.0), mask_mod=masks.causal_mask, backend="tiled"
    )
    torch.testing.assert_close(out, exact[0, 1, 150], rtol=1e-9, atol=1e-9)


def test_debug_mode_names_an_index_out_of_range() -> None:
    query, key, value = (torch.randn(1, 4, 200, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    short = torch.zeros(100, device=DEVICE)
    with flexattn.debug_mode(), pytest.raises(IndexError, match="captured tensor short of shape"):
        flexattn.flex_attention(query, key, value, lambda score, b, h, q_idx, kv_idx: score + short[kv_idx])
