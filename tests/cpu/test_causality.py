"""`assert_causal` finds what sees the future, in masks and in layers, and passes what does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flexattn import and_masks, create_block_mask, create_mask, flex_attention, masks
from flexattn.codegen.errors import TraceError
from flexattn.mask_object import name_of
from flexattn.testing import assert_causal

images = torch.tensor([-1, 0, 0, 0, -1, -1, 1, 1, -1, 2, 2, 2, 2, -1, -1, -1] * 5)
images = torch.where(images >= 0, images + torch.arange(5).repeat_interleave(16) * 3, -1)


def layer(mask_mod: Any = None) -> Any:
    return lambda q, k, v: flex_attention(q, k, v, mask_mod=mask_mod)


def text_of(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(AssertionError) as raised:
        assert_causal(*args, **kwargs)
    return str(raised.value)


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal_mask,
        masks.sliding_window(9),
        masks.streaming(2, 9),
        masks.dilated(3, 4),
        and_masks(masks.causal_mask, masks.document_mask(torch.arange(256) // 30)),
        lambda b, h, q, k: (q > 5) & (k < 5),
        lambda b, h, q, k: torch.zeros(256)[q] + q >= k,  # not by algebra: a tensor of unknown values
    ],
)
def test_causal_masks_pass(mask: Any) -> None:
    assert_causal(mask)


@pytest.mark.parametrize(
    "mask", [masks.noop_mask, masks.prefix_lm(7), masks.window(4, 2), masks.chunked(16), masks.causal(1)], ids=name_of
)
@pytest.mark.parametrize("shape", [40, (30, 50), (2, 3, 33, 20)])
def test_the_first_and_the_number_of_what_is_seen_too_early_are_those_of_brute_force(mask: Any, shape: Any) -> None:
    text = text_of(mask, shape)
    B, H, Q, KV = (
        shape if isinstance(shape, tuple) and len(shape) == 4 else (1, 1, *((shape, shape) if shape == 40 else shape))
    )
    future = create_mask(mask, B, H, Q, KV) & (torch.arange(KV) > torch.arange(Q).view(-1, 1))
    b, h, q_idx, kv_idx = future.nonzero()[0].tolist()
    assert f"it attends at b={b}, h={h}, q_idx={q_idx}, kv_idx={kv_idx}." in text
    assert f"\n{int(future.sum()):,} elements of" in text and "> q_idx" in text and "X" in text


def test_queries_may_start_later_than_keys() -> None:
    assert_causal(masks.causal.bottom_right(10, 50), (10, 50), offset=40)
    assert "q_idx=0, kv_idx=40." in text_of(masks.causal.bottom_right(10, 50), (10, 50), offset=39)
    assert_causal(masks.causal(-3), 20, offset=-3)


def test_images_may_see_themselves_both_ways() -> None:
    mask = masks.transfusion(images)
    assert_causal(mask, within=images)
    assert_causal(create_block_mask(mask, None, None, 80, 80, device="cpu"), within=images)
    assert "kv_idx=2." in text_of(mask, 80)
    batched = torch.stack([images, images.flip(0)])
    assert_causal(masks.transfusion(batched), within=batched)
    assert "of `within`" in text_of(masks.transfusion(batched.flip(0)), within=batched)
    assert_causal(lambda b, h, q, k: mask(b, h, q + 8, k), (60, 80), within=images, offset=8)


def test_a_block_mask_is_judged_by_its_lists() -> None:
    assert_causal(create_block_mask(masks.causal_mask, None, None, 200, 200, device="cpu"))
    exact = create_block_mask(masks.causal_mask, None, None, 200, 200, device="cpu", BLOCK_SIZE=64)
    assert "q_idx=0, kv_idx=1." in text_of(exact.with_mask_mod(None))


@pytest.mark.parametrize("mask", [masks.causal_mask, masks.sliding_window(20)], ids=name_of)
def test_a_causal_layer_passes(mask: Any) -> None:
    assert_causal(attention=layer(mask), shape=(2, 2, 140, 140))


def test_a_layer_of_a_longer_cache_passes() -> None:
    assert_causal(attention=layer(masks.causal(40)), shape=(20, 60), offset=40, kv_heads=1)
    assert "query 0 sees key 40." in text_of(attention=layer(masks.causal(40)), shape=(20, 60), offset=39)


@pytest.mark.parametrize(
    ("shape", "offset", "query", "key"), [((1, 9), 3, 0, 4), ((20, 60), 12, 19, 32), ((5, 9), -2, 4, 3)]
)
def test_keys_after_the_last_query_are_its_future(shape: tuple[int, int], offset: int, query: int, key: int) -> None:
    last = shape[0] - 1
    too_far = lambda b, h, q, k: (q + offset >= k) | ((q == last) & (k == key))
    assert f"query {query} sees key {key}." in text_of(attention=layer(too_far), shape=shape, offset=offset)
    assert_causal(attention=layer(masks.causal(offset)), shape=shape, offset=offset)


@pytest.mark.parametrize(
    ("mask", "query", "key"),
    [
        (masks.noop_mask, 0, 1),
        (masks.causal(1), 0, 1),
        (masks.causal(7), 0, 1),
        (lambda b, h, q, k: (q >= k) | (k == 77), 0, 77),
        (lambda b, h, q, k: (q >= k) | ((q >= 60) & (k >= 130)), 60, 130),
        (lambda b, h, q, k: (q >= k) | ((b == 1) & (h == 1) & (q == 63) & (k == 64)), 63, 64),
        (masks.transfusion(torch.cat([images, images[-1:].expand(70)])), 1, 2),
    ],
)
def test_a_layer_that_sees_the_future_is_told_with_query_and_key(mask: Any, query: int, key: int) -> None:
    text = text_of(attention=layer(mask), shape=(2, 2, 150, 150))
    assert f": query {query} sees key {key}.\nout[b=" in text and f"q_idx={query}, 0] is " in text


def test_a_layer_of_images_is_examined_outside_of_them() -> None:
    assert_causal(attention=layer(masks.transfusion(images)), within=images)
    crossing = lambda b, h, q, k: (q >= k) | ((images[q] >= 0) & (images[k] >= 0))
    assert "query 1 sees key 6." in text_of(attention=layer(crossing), within=images)


def test_a_layer_whose_images_end_one_late_is_found() -> None:
    ids = torch.full((90,), -1)
    ids[21:27], ids[50:59] = 0, 1
    first, last = torch.tensor([21, 50, 99]), torch.tensor([27, 59, 99])
    number = torch.where(ids < 0, 2, ids)

    def images(late: int) -> Any:
        def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            image = number[q_idx]
            return (q_idx >= kv_idx) | ((kv_idx >= first[image]) & (kv_idx < last[image] + late))

        return lambda q, k, v: flex_attention(q, k, v, mask_mod=mask)

    assert_causal(attention=images(0), within=ids)
    with pytest.raises(AssertionError, match=r"query 21 sees key 27\.\n"):
        assert_causal(attention=images(1), within=ids)


def test_the_mask_and_the_layer_are_both_examined() -> None:
    assert_causal(masks.causal_mask, 40, attention=layer(masks.causal_mask))
    assert "query 0 sees key 1." in text_of(masks.causal_mask, 40, attention=layer())


def test_half_precision_and_equal_zeros() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert_causal(attention=layer(masks.causal_mask), shape=40, dtype=dtype)
        assert "sees key" in text_of(attention=layer(), shape=40, dtype=dtype)
    sign = [0.0]

    def flips(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sign[0] = -sign[0]
        return torch.cat([torch.full_like(q[:, :, :1], sign[0]), v[:, :, 1:].cumsum(2)], 2)

    assert_causal(attention=flips, shape=20)


def test_nan_is_the_same_as_nan() -> None:
    def undefined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([v[:, :, :1] * float("nan"), v[:, :, 1:].cumsum(2)], 2)

    assert_causal(attention=undefined, shape=20)
    late = lambda q, k, v: torch.cat(
        [v[:, :, :1], v[:, :, 1:].cumsum(2).where(v[:, :, 19:].abs() < 9, float("nan"))], 2
    )
    assert "query 1 sees key 19." in text_of(attention=late, shape=20)


def test_a_layer_that_looks_at_nothing_does_not_pass() -> None:
    for nothing in (torch.zeros_like, torch.ones_like):
        assert "does not depend on its inputs" in text_of(attention=lambda q, k, v, f=nothing: f(q), shape=20)


def test_a_layer_that_is_random_does_not_pass() -> None:
    assert "does not repeat its own bits" in text_of(attention=lambda q, k, v: q + torch.rand(()), shape=20)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="needs a mask, or attention="):
        assert_causal()
    with pytest.raises(TypeError, match="takes mask functions"):
        assert_causal(torch.ones(3, 3).bool())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="within is"):
        assert_causal(masks.causal_mask, 100, within=images)
    with pytest.raises(ValueError, match="within must be an integer tensor"):
        assert_causal(masks.causal_mask, 80, within=images.float())
    with pytest.raises(ValueError, match=r"offset is 0\.5"):
        assert_causal(masks.causal_mask, 80, offset=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must return a tensor"):
        assert_causal(attention=lambda q, k, v: q.sum(), shape=10)
    with pytest.raises(TraceError):
        assert_causal(lambda b, h, q, k: q)


def test_a_mask_of_heads_needs_their_number() -> None:
    mask = lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) | (h == 1)
    with pytest.raises(ValueError, match=r"depends on the head h.*give shape=\(B, H, Q_LEN, KV_LEN\)"):
        assert_causal(mask, 40)
    assert "h=1" in text_of(mask, (1, 2, 40, 40))
