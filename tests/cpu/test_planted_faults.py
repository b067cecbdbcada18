"""Faults that custom attention ships with are found, with the smallest sizes at which they show."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from flexattn import AuxRequest, flex_attention
from flexattn.backends import schedule
from flexattn.backends.tiled import Chunk, Walk
from flexattn.codegen import derivative, pipeline
from flexattn.codegen.ir import Op
from flexattn.testing import Sizes, assert_matches_reference, case, gradcheck

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
SINGLE = Sizes(B=1, Hq=2, Hkv=2, L=96, S=96, E=16, Ev=16)


def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + SLOPES[h] * (kv_idx - q_idx)


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


def softcap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return 2.0 * torch.tanh(score / 2.0)


def scores_of(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.mT / math.sqrt(query.shape[-1])


def the_smallest(check: Callable[[], Any]) -> tuple[Sizes, str]:
    """The smallest failing sizes that a check names, and its text."""
    with pytest.raises(AssertionError) as failure:
        check()
    text = str(failure.value)
    found = re.search(r"^At Sizes\((.*)\), the smallest that fails", text, re.MULTILINE)
    assert found is not None, text
    return Sizes(**{name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", found[1])}), text


def dense(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """What is right, as a user may write it."""
    scores = scores_of(query, key).float() if query.dtype is not torch.float64 else scores_of(query, key)
    return torch.softmax(scores, -1).to(query.dtype) @ value, torch.logsumexp(scores, -1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_what_is_right_passes(dtype: torch.dtype) -> None:
    assert_matches_reference(attention=dense, dtype=dtype)
    assert_matches_reference(attention=torch.nn.functional.scaled_dot_product_attention, dtype=dtype)
    assert_matches_reference(
        mask_mod=causal,
        dtype=dtype,
        attention=lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    )


def test_a_dropped_last_tile_of_keys() -> None:
    def drops(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        whole = max(64, key.shape[2] // 64 * 64)
        return torch.softmax(scores_of(query, key[:, :, :whole]), -1) @ value[:, :, :whole]

    sizes, text = the_smallest(lambda: assert_matches_reference(attention=drops, shape=SINGLE))
    assert sizes == Sizes(1, 1, 1, 1, 65, 1, 1)
    assert "attention `test_a_dropped_last_tile_of_keys.<locals>.drops` at test_planted_faults.py" in text
    assert "kv_idx=64" in text and "float32" in text and "seed=0" in text


def test_a_backend_that_drops_the_last_tile_of_keys() -> None:
    chunks = Walk.chunks

    def drops(self: Walk, *rest: Any) -> Iterator[Chunk]:
        made = list(chunks(self, *rest))
        return iter(made[:-1] or made)

    schedule.everything.cache_clear()  # made for other sizes
    with patch.multiple(schedule, TILE_ELEMENTS=16, MIN_WIDTH=16), patch.object(Walk, "chunks", drops):
        sizes, text = the_smallest(lambda: assert_matches_reference(softcap, shape=SINGLE, backend="tiled"))
    schedule.everything.cache_clear()
    assert sizes == Sizes(1, 1, 1, 1, 17, 1, 1)
    assert "backend 'tiled'" in text and "score_mod `softcap` at test_planted_faults.py" in text


def test_alibi_with_the_wrong_sign() -> None:
    def mirrored(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        L, S = query.shape[2], key.shape[2]
        distance = torch.arange(L)[:, None] - torch.arange(S)
        bias = SLOPES[: query.shape[1], None, None] * distance
        return torch.softmax(scores_of(query, key) + bias, -1) @ value

    sizes, text = the_smallest(lambda: assert_matches_reference(alibi, attention=mirrored, shape=SINGLE))
    assert sizes == Sizes(1, 1, 1, 1, 2, 1, 1)  # a bias that all keys share changes nothing
    assert "is not what score_mod `alibi`" in text


def test_a_forgotten_scale() -> None:
    def unscaled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(query @ key.mT, -1) @ value

    sizes, _ = the_smallest(lambda: assert_matches_reference(attention=unscaled, shape=SINGLE))
    assert sizes == Sizes(1, 1, 1, 1, 2, 2, 1)  # with E = 1 the scale is 1


def test_lse_in_base_2() -> None:
    def binary(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = dense(query, key, value)
        return out, lse / math.log(2)

    sizes, text = the_smallest(lambda: assert_matches_reference(attention=binary, shape=SINGLE))
    assert sizes == Sizes(1, 1, 1, 1, 1, 1, 1)
    assert "multiply it by log(2)" in text and "right: out" in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["lse", "max_scores"])
def test_scores_that_are_off_by_far_less_than_those_of_plain_attention(dtype: torch.dtype, name: str) -> None:
    """Plain attention rounds them to 16 bits; a fused kernel does not."""

    def off(*given: Any, **options: Any) -> tuple[Tensor, AuxRequest]:
        out, aux = flex_attention(*given, **options)
        return out, aux._replace(**{name: getattr(aux, name) + torch.finfo(dtype).eps / 16})

    with patch.object(case, "flex_attention", off), pytest.raises(AssertionError, match=f"{name} is wrong in"):
        assert_matches_reference(shape=SINGLE, dtype=dtype)


class _MissesQueries(torch.autograd.Function):
    """Attention whose dk has no contribution of the queries from 64 on."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return dense(query, key, value)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            dq, _, dv = torch.autograd.grad(dense(q, k, v)[0], (q, k, v), grad)
            (dk,) = torch.autograd.grad(dense(q, k, v)[0][:, :, :64], k, grad[:, :, :64])
        return dq, dk, dv


def test_a_dk_that_misses_a_block_of_queries() -> None:
    sizes, text = the_smallest(lambda: assert_matches_reference(attention=_MissesQueries.apply, shape=SINGLE))
    assert sizes == Sizes(1, 1, 1, 65, 2, 1, 1)
    assert "dk is wrong" in text and "right: out, dq, dv" in text
    assert "The forward is right: look at the backward of dk" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_in_16_bits(dtype: torch.dtype) -> None:
    def sums(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = torch.softmax(scores_of(query, key).float(), -1)
        out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.bfloat16)
        for i in range(key.shape[2]):
            out = out + (weights[..., i, None] * value[:, :, i, None]).bfloat16()
        return out.to(query.dtype)

    with pytest.raises(AssertionError, match="out is wrong in"), torch.no_grad():
        assert_matches_reference(attention=sums, dtype=dtype)


def test_a_softmax_that_overflows() -> None:
    def naive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = torch.exp(query @ key.mT * 9.0)
        return weights / weights.sum(-1, keepdim=True) @ value

    _, text = the_smallest(lambda: assert_matches_reference(attention=naive, shape=SINGLE, scale=9.0))
    assert "found   nan" in text and "no maximum is taken" in text


def test_a_score_mod_that_no_float32_holds_says_so() -> None:
    with pytest.raises(AssertionError, match=r"Plain attention in this precision has that in .*, too"):
        assert_matches_reference(lambda score, b, h, q_idx, kv_idx: torch.exp(100 + score.abs()) / 1e38, shape=SINGLE)


@pytest.fixture
def wrong_derivative() -> Iterator[None]:
    """tanh with slope 1."""
    pipeline.variant.cache_clear()
    with patch.dict(derivative.DERIVATIVES, {Op.TANH: lambda node, grad: (grad,)}):
        yield
    pipeline.variant.cache_clear()


def test_a_wrong_derivative(wrong_derivative: None) -> None:
    sizes, text = the_smallest(lambda: assert_matches_reference(softcap, shape=SINGLE))
    assert sizes == Sizes(1, 1, 1, 1, 1, 1, 1)  # through lse, which has a gradient even with one key
    assert "right: out, lse, max_scores, dv" in text
    with pytest.raises(
        AssertionError, match=r"by query\[b=0, h=\d, q_idx=\d+, d=\d\]:\n    generated derivative  .*\n    central"
    ):
        gradcheck(softcap)
