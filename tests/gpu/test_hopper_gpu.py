"""The warp-specialised kernel on a Hopper GPU: right by float64, and the same as the ordinary kernel but for rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu.cases import DEVICE, Case, assert_results, assert_right, qkv
from gpu.test_attention_gpu import VARIANTS, H, learned_alibi

from flexattn import flex_attention, masks, mods

WARP_SPECIALIZED = {"WARP_SPECIALIZED": True}


@pytest.fixture(autouse=True)
def _on_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for GPUs of compute capability 9.0")


def case(*args: Any, **kwargs: Any) -> Case:
    return Case(*args, **kwargs, options=WARP_SPECIALIZED)


@pytest.mark.parametrize("E", [64, 128])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_right_to_the_last_element(variant: str, E: int) -> None:
    assert_right(case(*qkv(2, H, E=E), **VARIANTS[variant]()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_equals_the_ordinary_kernel_but_for_rounding(variant: str) -> None:
    # The order in which tiles are visited is the same; that of sums inside a tile is not.
    special = case(*qkv(2, H), **VARIANTS[variant]())
    found = special.run()
    special.options = None
    ordinary = special.run()
    torch.testing.assert_close(found["max_scores"], ordinary["max_scores"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["lse"], ordinary["lse"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found["out"], ordinary["out"], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("E", "Ev"), [(64, 64), (64, 128), (128, 64), (128, 128)])
def test_head_dimensions_and_dtypes(dtype: torch.dtype, E: int, Ev: int) -> None:
    assert_right(case(*qkv(L=777, E=E, Ev=Ev, dtype=dtype), **learned_alibi()))


@pytest.mark.parametrize(
    ("L", "S"), [(1, 1), (1, 1000), (127, 129), (129, 127), (1000, 4095), (4095, 1000), (128, 8192)], ids=str
)
def test_any_two_lengths_are_right(L: int, S: int) -> None:
    assert_right(case(*qkv(1, 2, L=L, S=S), mask=masks.causal(S - L)))
    assert_right(case(*qkv(1, 2, L=L, S=S)))


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (8, 1)])
def test_query_heads_share_key_heads(heads: int, kv_heads: int) -> None:
    assert_right(case(*qkv(2, heads, kv_heads, L=515, E=128), **learned_alibi(heads)))


def test_a_batch_of_one_shares_its_keys() -> None:
    q, k, v = qkv(3, L=300)
    assert_right(case(q, k[:1], v[:1], mask=masks.causal_mask))


def test_the_heads_may_be_the_innermost_dimension_but_one() -> None:
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv())
    assert_right(case(q, k, v, mask=masks.causal_mask))


def test_rows_that_attend_to_nothing() -> None:
    nothing = lambda b, h, q_idx, kv_idx: (q_idx % 3 > 0) & (q_idx >= kv_idx + 200)
    assert_right(case(*qkv(L=700), mask=nothing))


@pytest.mark.parametrize(("keys", "stages"), [(64, 2), (64, 3), (64, 4), (128, 2)])
def test_any_tile_and_any_number_of_stages(keys: int, stages: int) -> None:
    special = case(*qkv(2, H, L=1500, E=128), **learned_alibi())
    special.options = WARP_SPECIALIZED | {"fwd_BLOCK_N": keys, "fwd_num_stages": stages}
    assert_right(special)


def test_the_same_bits_come_out_a_hundred_times() -> None:
    special = case(*qkv(2, 16, L=4096, E=128), score=mods.alibi, captured=(mods.alibi_slopes(16, DEVICE),),
                   mask=masks.causal_mask)  # fmt: skip
    q, k, v = special.query, special.key, special.value

    def out() -> torch.Tensor:
        return flex_attention(
            q, k, v, mods.alibi(*special.captured), mask_mod=masks.causal_mask, kernel_options=WARP_SPECIALIZED
        )

    first = out()
    for _ in range(100):
        assert torch.equal(out(), first), "a race: what is copied and what is read overlap"
    assert_results(special, special.run())


def test_what_it_cannot_take_is_an_error_and_not_another_kernel() -> None:
    with pytest.raises(ValueError, match="head dimensions are 80 and 80"):
        case(*qkv(E=80)).run()
