"""`assert_matches_reference`: what it accepts, what it compares, and the errors about its arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flexattn
from flexattn import create_block_mask, flex_attention, masks
from flexattn.testing import Sizes, assert_matches_reference, gradcheck
from flexattn.testing.smallest import smallest
from flexattn.testing.verdict import excess

SMALL = Sizes(B=2, Hq=4, Hkv=2, L=40, S=50, E=16, Ev=8)


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


def sink(out: Tensor, lse: Tensor) -> Tensor:
    """As if each row had one more key, of score 0.5 and value 0."""
    return out * torch.sigmoid(lse - 0.5).unsqueeze(-1).to(out.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_learned_tensors_and_a_normalizer(dtype: torch.dtype) -> None:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], requires_grad=True)
    table = torch.randn(4, 100).bfloat16().requires_grad_()

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + slopes[h] * (kv_idx - q_idx) + table[h, q_idx - kv_idx + 49]

    assert_matches_reference(mod, causal, shape=SMALL, dtype=dtype)
    assert_matches_reference(mod, causal, shape=SMALL, dtype=dtype, normalizer=sink, backend="tiled")


def test_rows_that_attend_to_nothing_and_scores_that_are_infinite() -> None:
    def late(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx > q_idx + 20

    def hides(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.where(kv_idx % 3 == 0, -float("inf"), score)

    assert_matches_reference(hides, late, shape=SMALL)
    assert_matches_reference(hides, late, shape=SMALL, normalizer=sink)


@pytest.mark.parametrize("empty", [{"L": 0}, {"S": 0}])
def test_empty_lengths(empty: dict[str, int]) -> None:
    assert_matches_reference(mask_mod=causal, shape=SMALL._replace(**empty))


def test_a_mod_that_computes_with_captured_tensors_alone() -> None:
    logs = torch.randn(4, requires_grad=True)
    assert_matches_reference(lambda score, b, h, q_idx, kv_idx: score * logs.exp()[h], causal, shape=SMALL)
    with pytest.raises(AssertionError, match="out is wrong in"):
        assert_matches_reference(
            lambda score, b, h, q_idx, kv_idx: score * logs.exp()[h], attention=_plain, shape=SMALL._replace(Hkv=4)
        )


def _plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, -1) @ value


def test_a_block_mask_is_judged_by_its_lists() -> None:
    whole = create_block_mask(masks.causal_mask, None, None, 40, 40, BLOCK_SIZE=16)
    assert_matches_reference(block_mask=whole)
    with pytest.raises(AssertionError) as failure:
        assert_matches_reference(block_mask=whole, attention=_plain)
    text = str(failure.value)
    assert "L=1, S=2" in text and "block_mask=block_mask._adjust(1, 2)" in text and "block_mask of" in text


def test_operands_that_are_given() -> None:
    q, k, v = (torch.randn(1, 2, 30, 8) * 3 for _ in range(3))
    assert_matches_reference(mask_mod=causal, query=q, key=k, value=v)
    with pytest.raises(AssertionError) as failure:
        assert_matches_reference(mask_mod=causal, query=q, key=k, value=v, attention=_plain)
    assert "query=query[:1, :1, :1, :1], key=key[:1, :1, :2, :1], value=value[:1, :1, :2, :1]" in str(failure.value)


def test_an_attention_without_a_graph_is_compared_forward() -> None:
    def detached(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _plain(query, key, value).detach()

    assert_matches_reference(attention=detached, shape=SMALL._replace(Hkv=4))


def test_a_kink_where_scores_are_equal_is_no_failure() -> None:
    """The gradient of clamp jumps where a score is at the bound up to rounding; either side is right."""
    q = torch.zeros(1, 1, 12, 4)
    q[..., 0] = 1.0
    k, v = q + 2.0**-23 * torch.randint(-2, 3, q.shape), torch.randn(q.shape)
    assert_matches_reference(
        lambda score, b, h, q_idx, kv_idx: score.clamp(max=1.0), query=q, key=k, value=v, scale=1.0
    )


def test_a_wrong_element_is_found_among_right_ones() -> None:
    def bad(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        made = flex_attention(query, key, value).clone()
        made[:, -1:, 17:18, 3:4] += 1e-5
        return made

    with pytest.raises(AssertionError) as failure:
        assert_matches_reference(attention=bad, shape=SMALL._replace(Hkv=4))
    text = str(failure.value)
    assert "out is wrong in 1 of" in text and "q_idx=17, d=3" in text and "dq" in text.partition("right: ")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": Sizes(Hq=3, Hkv=2)}, "Hq=3 is no multiple of Hkv=2"),
        ({"dtype": torch.int32}, "use one of float16"),
        ({"mask_mod": causal, "block_mask": create_block_mask(causal, None, None, 8, 8)}, "pass one of the two"),
        ({"query": torch.zeros(1, 1, 2, 2)}, "all three or not at all"),
        ({"attention": _plain, "backend": "tiled"}, "leave them out"),
        ({"attention": lambda q, k, v: q[:, :1]}, r"it must be \(2, 4, 160, 32\)"),
        ({"shape": Sizes(), "query": torch.zeros(1, 1, 2, 2), "key": torch.zeros(1, 1, 2, 2), "value": torch.zeros(1, 1, 2, 2)},
         "leave shape out"),
        ({"shape": Sizes(L=9), "block_mask": create_block_mask(causal, None, None, 8, 8)}, "was made for lengths"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assert_matches_reference(**arguments)


def test_an_attention_that_returns_something_else() -> None:
    with pytest.raises(TypeError, match="must return out, or"):
        assert_matches_reference(attention=lambda q, k, v: [q], shape=SMALL)
    with pytest.raises(AssertionError, match=r"taken for normalized; return \(out, lse\) if it is not"):
        assert_matches_reference(attention=_plain, normalizer=sink, shape=SMALL._replace(Hkv=4))


@pytest.mark.parametrize("check", [assert_matches_reference, gradcheck])
@pytest.mark.parametrize("shape", [64, (2, 4, 4, 16)])
def test_a_shape_that_is_not_sizes(check: Any, shape: Any) -> None:
    with pytest.raises(TypeError, match=r"shape is .*; write Sizes\(B=1, L=64, S=64\)"):
        check(lambda score, b, h, q_idx, kv_idx: 2 * score, shape=shape)


def test_a_normalizer_that_returns_something_else() -> None:
    with pytest.raises(TypeError, match="normalizer returned a NoneType; it must return a new out"):
        assert_matches_reference(normalizer=lambda out, lse: None, shape=SMALL)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"shape \(2, 4, 33\); out has .* as x\[..., None\]"):
        assert_matches_reference(normalizer=lambda out, lse: out.sum(-1), shape=SMALL._replace(L=33))


def test_a_captured_tensor_that_is_too_short_is_named() -> None:
    short = torch.zeros(30)
    with pytest.raises(
        ValueError, match=r"(?s)index 30 is out of range .* have shapes short \(30,\).*Pass shape=Sizes"
    ):
        assert_matches_reference(lambda score, b, h, q_idx, kv_idx: score + short[q_idx], shape=SMALL)


def test_a_failure_leaves_the_gradients_of_captured_tensors_alone() -> None:
    slopes = torch.ones(4, requires_grad=True)
    assert_matches_reference(lambda score, b, h, q_idx, kv_idx: score * slopes[h], shape=SMALL)
    assert slopes.grad is None


def test_the_search_keeps_whole_groups_and_finds_each_bound() -> None:
    assert smallest(Sizes(), lambda s: s.Hq > 2 and s.S > 100 and s.E >= 3) == Sizes(1, 3, 1, 1, 101, 3, 1)
    assert smallest(Sizes(), lambda s: s.Hkv == 2, Sizes(2, 1, 1, 1, 1, 1, 1)) == Sizes(2, 2, 2, 1, 1, 1, 1)


def test_nan_and_infinity_must_be_in_their_places() -> None:
    nan, inf = float("nan"), float("inf")
    exact = torch.tensor([1.0, nan, inf, -inf, 7e4], dtype=torch.float64)
    allowed = torch.full((5,), 0.1, dtype=torch.float64)
    right = torch.tensor([1.05, nan, inf, -inf, inf], dtype=torch.float16)  # 7e4 is beyond float16
    assert excess("x", right, exact, allowed) is None
    for i, wrong in enumerate((nan, 1.0, -inf, 0.0, 6e4)):
        found = right.clone()
        found[i] = wrong
        worst = excess("x", found, exact, allowed)
        assert worst is not None and worst.at == (i,) and worst.wrong == 1


def test_the_tools_are_imported_on_their_own() -> None:
    assert "assert_matches_reference" in flexattn.testing.__all__


def test_a_tensor_that_is_computed_of_another_captured_one() -> None:
    first = torch.randn(4, requires_grad=True)
    second = -2 * first
    assert_matches_reference(lambda score, b, h, q_idx, kv_idx: score * first[h] + second[h] * kv_idx, shape=SMALL)


def with_sinks(sinks: Tensor, sign: int = 1, detached: bool = False) -> Any:
    """Dense attention whose softmax has one more key, of score `sinks[h]` and value 0."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.mT / query.shape[-1] ** 0.5
        lse = scores.logsumexp(-1, keepdim=True)
        lse = lse.detach() if detached else lse
        return torch.sigmoid(sign * (lse - sinks[: query.shape[1], None, None])) * (torch.softmax(scores, -1) @ value)

    return attention


def test_an_attention_with_sinks_inside_is_compared_with_the_normalized_reference() -> None:
    sinks = torch.linspace(-1, 2, 4)
    normalizer = lambda out, lse: out * torch.sigmoid(lse - sinks[: lse.shape[1], None])[..., None]
    shape = Sizes(2, 4, 4, 40, 50, 16, 8)
    assert_matches_reference(attention=with_sinks(sinks), normalizer=normalizer, shape=shape)
    with pytest.raises(AssertionError, match="normalized is wrong"):
        assert_matches_reference(attention=with_sinks(sinks, sign=-1), normalizer=normalizer, shape=shape)
    with pytest.raises(AssertionError, match="dq is wrong"):
        assert_matches_reference(attention=with_sinks(sinks, detached=True), normalizer=normalizer, shape=shape)


def test_an_index_that_wraps_is_legal() -> None:
    table = torch.randn(4, 100).requires_grad_()
    mod = lambda score, b, h, q_idx, kv_idx: score + table[h, q_idx - kv_idx]
    gradcheck(mod, masks.sliding_window(5), entries=2)
    assert_matches_reference(mod, masks.causal_mask, shape=Sizes(1, 4, 4, 20, 20, 8, 8))
