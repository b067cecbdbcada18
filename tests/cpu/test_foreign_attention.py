"""`attention=` of the checks, with functions as people have them: random, writing to their inputs, of other layouts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flexattn import Documents, masks
from flexattn.testing import (
    Sizes,
    assert_batch_invariant,
    assert_causal,
    assert_matches_reference,
    assert_no_leak,
)

SIZES = Sizes(B=1, Hq=2, Hkv=2, L=24, S=24, E=8, Ev=8)
IDS = torch.tensor([0] * 10 + [1] * 14)
PACKED = Documents.from_lengths([10, 14])


def right(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def with_dropout(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=0.2)


def scales_its_query(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query *= 1 / math.sqrt(query.shape[-1])  # as it may where the query is the result of a projection
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)


def turns_its_key(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key.data[..., 0] *= 1.5
    return right(query, key, value)


def clears_its_value(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = right(query, key, value)
    value.data.zero_()
    return out


def check_matches(attention: Callable[..., Any]) -> None:
    assert_matches_reference(mask_mod=masks.causal_mask, attention=attention, shape=SIZES)


def check_causal(attention: Callable[..., Any]) -> None:
    assert_causal(attention=attention, shape=(1, 2, 24, 24))


def check_leaks(attention: Callable[..., Any]) -> None:
    assert_no_leak(None, torch.zeros(24, dtype=torch.int64), attention=attention)


def check_invariance(attention: Callable[..., Any]) -> None:
    def alone(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Any:
        ends = documents.cu_seqlens.tolist()
        parts = [
            attention(*(t[:, :, start:stop].clone() for t in (query, key, value))) for start, stop in pairwise(ends)
        ]
        return torch.cat(parts, 2) if isinstance(parts[0], Tensor) and parts[0].shape[1] == query.shape[1] else parts[0]

    assert_batch_invariant(documents=PACKED, attention=alone)


CHECKS = [check_matches, check_causal, check_leaks, check_invariance]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("attention", [right, scales_its_query, lambda q, k, v: right(q, k, v).detach()])
def test_what_is_right_passes(check: Callable[..., None], attention: Callable[..., Any]) -> None:
    check(attention)


@pytest.mark.parametrize("check", CHECKS)
def test_what_is_random_is_told_so(check: Callable[..., None]) -> None:
    torch.manual_seed(0)
    with pytest.raises(
        AssertionError, match=r"second run on the same inputs|the same inputs .* in a second run"
    ) as raised:
        check(with_dropout)
    assert "dropout" in str(raised.value) and "the smallest that fails" not in str(raised.value)


@pytest.mark.parametrize(
    "attention, name, wrong", [(turns_its_key, "key", "out"), (clears_its_value, "value", "dq")], ids=["key", "value"]
)
def test_what_is_written_to_the_inputs_does_not_change_what_is_right(
    attention: Callable[..., Tensor], name: str, wrong: str
) -> None:
    with pytest.raises(AssertionError, match=f"{wrong} is wrong in .* elements") as raised:
        check_matches(attention)
    assert f"It writes to its {name}: " in str(raised.value)


def test_tensors_that_are_given_are_not_written_to() -> None:
    query, key, value = (torch.randn(1, 2, 24, 8) for _ in range(3))
    before = key.clone()
    with pytest.raises(AssertionError, match="It writes to its key"):
        assert_matches_reference(mask_mod=masks.causal_mask, attention=turns_its_key, query=query, key=key, value=value)
    assert torch.equal(key, before)


def test_an_attention_is_handed_the_strides_that_are_given() -> None:
    packed = torch.randn(1, 24, 2, 3, 8)
    seen = []

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append((query.stride(), key.stride(), value.stride()))
        return right(query, key, value)

    query, key = (packed[..., i, :].transpose(1, 2) for i in range(2))
    value = torch.randn(24, 8).expand(1, 2, -1, -1)
    assert_matches_reference(mask_mod=masks.causal_mask, attention=attention, query=query, key=key, value=value)
    assert seen == [(query.stride(), key.stride(), value.stride())]


WRAP = "Wrap it: lambda q, k, v: layer(q, k, v)"


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "made, advice",
    [
        (lambda out: (out, None), f"{WRAP}[0]"),
        (lambda out: (out, out @ out.mT), f"{WRAP}[0]"),
        (lambda out: [out], f"{WRAP}[0]"),
        (lambda out: (out.transpose(1, 2), None), f"{WRAP}[0].transpose(1, 2)"),
        (lambda out: out.transpose(1, 2), f"{WRAP}.transpose(1, 2)"),
        (lambda out: None, "a NoneType"),
        (lambda out: out.detach().numpy(), "a ndarray"),
    ],
    ids=["none", "weights", "list", "layer", "layout", "nothing", "numpy"],
)
def test_another_result_is_refused_with_what_to_write(
    check: Callable[..., None], made: Callable[[Tensor], Any], advice: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"must (return|be).*{re.escape(advice)}$"):
        check(lambda q, k, v: made(right(q, k, v)))


def test_a_gradient_that_is_zero_at_the_smallest_sizes_is_named() -> None:
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            return right(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return grad, None, 2 * grad

    with pytest.raises(AssertionError, match="The forward is right and every gradient is wrong: "):
        check_matches(Cut.apply)


def test_nothing_but_nan_is_no_batch_invariance() -> None:
    with pytest.raises(AssertionError, match="nan everywhere, so that nothing was tested"):
        check_invariance(lambda q, k, v: right(q, k, v) * float("nan"))


def test_a_part_without_gradient_is_no_error_of_batch_invariance() -> None:
    check_invariance(lambda q, k, v: right(q, k.detach(), v))
