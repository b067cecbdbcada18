"""Attention on a GPU: outputs and gradients, element by element, over variants, dtypes, head sizes, lengths and layouts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from gpu.cases import DEVICE, Case, Mod, assert_results, assert_right, qkv
from torch import Tensor

from flexattn import AuxRequest, and_masks, flex_attention, masks, mods

H, LENGTH = 4, 1000


def document_ids(*shape: int) -> Tensor:
    """Documents of uneven lengths, about eight in a sequence."""
    return (torch.rand(shape, device=DEVICE) < 8 / shape[-1]).cumsum(-1)


def learned_alibi(heads: int = H) -> dict[str, object]:
    return {"score": mods.alibi, "captured": (mods.alibi_slopes(heads, DEVICE),), "mask": masks.causal_mask}


def learned_cap(cap: Tensor) -> Mod:
    return lambda score, b, h, q_idx, kv_idx: cap * torch.tanh(score / cap)


def two_tables(row: Tensor, column: Tensor) -> Mod:
    return lambda score, b, h, q_idx, kv_idx: score * torch.sigmoid(row[b, q_idx]) + column[h, kv_idx]


VARIANTS = {
    "noop": lambda: {},
    "causal": lambda: {"mask": masks.causal_mask},
    "alibi": learned_alibi,
    "softcap": lambda: {"score": lambda: mods.softcap(2.0), "mask": masks.causal_mask},
    "learned softcap": lambda: {"score": learned_cap, "captured": (torch.tensor(2.0, device=DEVICE),)},
    "relative bias": lambda: {
        "score": mods.relative_bias,
        "captured": (torch.randn(H, 2 * LENGTH - 1, device=DEVICE),),
    },
    "row and column": lambda: {
        "score": two_tables,
        "captured": (torch.randn(2, LENGTH, device=DEVICE), torch.randn(H, LENGTH, device=DEVICE)),
    },
    "documents": lambda: {"mask": and_masks(masks.document_mask(document_ids(2, LENGTH)), masks.causal_mask)},
    "sliding window": lambda: {"mask": masks.sliding_window(256)},
    "prefix of each batch entry": lambda: {"mask": masks.prefix_lm(torch.tensor([1, 700], device=DEVICE))},
    "window of each head": lambda: {"mask": lambda b, h, q_idx, kv_idx: abs(q_idx - kv_idx) <= 150 * h},
}


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_right_to_the_last_element(variant: str) -> None:
    assert_right(Case(*qkv(2, H, L=LENGTH), **VARIANTS[variant]()))


@pytest.mark.parametrize(
    ("dtype", "E"),
    [(torch.float16, 128), (torch.bfloat16, 128), (torch.float32, 64), (torch.float32, 128)],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_causal_attention_with_learned_slopes_is_right_in_every_dtype(dtype: torch.dtype, E: int) -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    assert_right(Case(*qkv(E=E, L=777, dtype=dtype), **learned_alibi()))


@pytest.mark.usefixtures("matmul_precision")
def test_float32_is_as_exact_as_torch_where_tf32_is_allowed() -> None:
    torch.set_float32_matmul_precision("high")
    case = Case(*qkv(E=64, L=777, dtype=torch.float32), **learned_alibi())
    allowed = case.run()
    assert_results(case, allowed)
    torch.set_float32_matmul_precision("highest")
    full = case.run()
    assert_results(case, full)  # nothing compiled for TF32 is taken here
    assert not torch.equal(allowed["out"], full["out"]), "TF32 was allowed and not used"


@pytest.mark.parametrize("E", [16, 72, 80, 96, 192, 256])
def test_any_head_size_is_right(E: int) -> None:
    assert_right(Case(*qkv(1, H, L=300, E=E), mask=masks.causal_mask))


def test_a_head_size_of_256_in_float32_finds_a_configuration_that_fits() -> None:
    assert_right(Case(*qkv(1, H, L=300, E=256, dtype=torch.float32), mask=masks.causal_mask))


@pytest.mark.parametrize(("E", "Ev"), [(64, 128), (192, 128), (40, 24)])
def test_values_may_have_another_head_size_than_keys(E: int, Ev: int) -> None:
    assert_right(Case(*qkv(1, H, L=300, E=E, Ev=Ev), mask=masks.causal_mask))


@pytest.mark.parametrize(("heads", "kv_heads", "E"), [(32, 8, 128), (8, 1, 64)])
def test_query_heads_share_key_heads(heads: int, kv_heads: int, E: int) -> None:
    assert_right(Case(*qkv(2, heads, kv_heads, L=515, E=E), **learned_alibi(heads)))


@pytest.mark.parametrize(
    ("L", "S"), [(1, 1), (1, 1000), (127, 129), (129, 127), (1000, 4095), (4095, 1000)], ids=lambda n: str(n)
)
def test_any_two_lengths_are_right(L: int, S: int) -> None:
    # Aligned at the end: with more queries than keys the first ones attend to nothing.
    assert_right(Case(*qkv(1, 2, L=L, S=S), mask=masks.causal(S - L)))


def test_lengths_that_are_no_multiple_of_a_block_are_right_without_a_mask() -> None:
    assert_right(Case(*qkv(1, 2, L=129, S=513)))


@pytest.mark.parametrize(("L", "S"), [(0, 5), (5, 0), (0, 0)])
def test_empty_lengths_are_lengths_too(L: int, S: int) -> None:
    case = Case(*qkv(1, 2, L=L, S=S), score=mods.alibi, captured=(torch.ones(2, device=DEVICE),))
    results = case.run()
    assert results["out"].shape == (1, 2, L, 64)
    assert (results["lse"] == -math.inf).all() and (results["max_scores"] == -math.inf).all()
    for name in ("out", "dq", "dk", "dv", "d captured 0"):
        assert not results[name].any(), name


def test_the_heads_may_be_the_innermost_dimension_but_one() -> None:
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv())
    case = Case(q, k, v, mask=masks.causal_mask)
    case.dout = case.dout.transpose(1, 2).contiguous().transpose(1, 2)
    results = case.run()
    assert results["out"].transpose(1, 2).is_contiguous()
    assert_results(case, results)


def test_odd_strides_are_read_as_they_are() -> None:
    q, k, v = qkv(L=300)
    q = torch.cat([q, q], -1)[..., 3 : 3 + q.shape[-1]]  # rows that start off 16 bytes
    k = k.mT.contiguous().mT
    v = torch.stack([v, v], -1)[..., 0]
    assert_right(Case(q, k, v, mask=masks.causal_mask))


@pytest.mark.parametrize("expanded", ["heads", "batch", "a batch of one"])
def test_keys_may_be_expanded(expanded: str) -> None:
    q, k, v = qkv(L=300)
    if expanded == "heads":
        k, v = (t[:, :1].expand(-1, H, -1, -1) for t in (k, v))
    else:
        k, v = (t[:1] if expanded == "a batch of one" else t[:1].expand(2, -1, -1, -1) for t in (k, v))
    assert_right(Case(q, k, v, mask=masks.causal_mask))


def test_an_incoming_gradient_may_be_expanded() -> None:
    case = Case(*qkv(L=300), mask=masks.causal_mask)
    case.dout = case.dout[:, :, :1, :1].expand_as(case.dout)  # what .sum().backward() sends
    assert_right(case)


@pytest.mark.parametrize("alone", ["out", "lse"])
def test_the_gradient_of_one_output_alone_is_right(alone: str) -> None:
    repeatable = {"DETERMINISTIC": True}
    case = Case(*qkv(L=300), **learned_alibi(), options=repeatable)
    (case.dlse if alone == "out" else case.dout).zero_()
    results = case.run()
    assert_results(case, results)
    q, k, v = leaves = [t.detach().requires_grad_() for t in (case.query, case.key, case.value)]
    out, lse = flex_attention(
        q, k, v, mods.alibi(*case.captured), mask_mod=case.mask, return_lse=True, kernel_options=repeatable
    )
    grads = torch.autograd.grad(*((out, leaves, case.dout) if alone == "out" else (lse, leaves, case.dlse)))
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        assert torch.equal(grad, results[name]), name


def test_max_scores_is_not_differentiable() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(L=300))
    _, aux = flex_attention(q, k, v, mask_mod=masks.causal_mask, return_aux=AuxRequest(lse=True, max_scores=True))
    assert aux.lse is not None and aux.lse.requires_grad
    assert aux.max_scores is not None and not aux.max_scores.requires_grad


def test_a_captured_number_may_be_a_tensor_on_the_cpu() -> None:
    mod = lambda t: lambda score, b, h, q_idx, kv_idx: score * t
    case = Case(*qkv(L=300), score=mod, captured=(torch.tensor(0.7),))
    results = case.run()
    assert results["d captured 0"].device.type == "cpu"
    assert_results(case, results)


def test_pinned_tiles_change_no_result() -> None:
    tiles = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32}
    options = {**tiles, "num_warps": 4, "num_stages": 2}
    assert_right(Case(*qkv(1, H, L=515), **learned_alibi(), options=options))


def test_fast_tanh_is_as_exact_as_its_instruction() -> None:
    q, k, v = qkv(L=500)
    cap = 5.0
    mod = mods.softcap(cap)
    exact, fast = (
        flex_attention(q, k, v, mod, return_lse=True, kernel_options={"FAST_TANH": f})[1] for f in (False, True)
    )
    error = (exact - fast).abs().max().item()
    assert 0 < error <= cap * 2**-10, "scores differ by 2^-11 of the cap at most, and so does lse"
    leaves = [t.requires_grad_() for t in (q, k, v)]
    results = []
    for option in (False, True):
        out = flex_attention(*leaves, mod, kernel_options={"FAST_TANH": option})
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
