"""flex_attention as a user calls it: results, outputs, errors, layout, memory, gradients."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as peer

import flexattn
from flexattn import AuxRequest, create_block_mask, flex_attention, masks, mods


def qkv(
    B: int = 2, H: int = 4, Hkv: int = 4, L: int = 50, S: int = 50, E: int = 16, Ev: int = 16, **kw: Any
) -> list[Tensor]:
    return [torch.randn(B, H, L, E, **kw), torch.randn(B, Hkv, S, E, **kw), torch.randn(B, Hkv, S, Ev, **kw)]


def test_the_signature_is_pytorchs_with_ours_appended() -> None:
    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (flex_attention, peer.flex_attention))
    for a, b in zip(ours, theirs, strict=False):
        assert (a.name, a.kind, a.default) == (b.name, b.kind, b.default)
    assert [p.name for p in ours[len(theirs) :]] == ["mask_mod", "backend", "batch_invariant"]
    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (create_block_mask, peer.create_block_mask))
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert [(p.name, p.kind) for p in ours[len(theirs) :]] == [("max_memory", inspect.Parameter.KEYWORD_ONLY)]
    assert set(peer.AuxRequest._fields) == set(flexattn.AuxRequest._fields)
    assert set(peer.AuxOutput._fields) == set(flexattn.AuxOutput._fields)


def test_it_agrees_with_pytorchs_flex_attention() -> None:
    q, k, v = qkv(L=70, S=70)
    slopes = mods.alibi_slopes(4)

    def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + slopes[h] * (kv_idx - q_idx)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer warns that it is not compiled
        mask = peer.create_block_mask(masks.causal_mask, None, None, 70, 70, device="cpu")
        expected, aux = peer.flex_attention(q, k, v, alibi, mask, return_aux=peer.AuxRequest(lse=True))
    ours, our_aux = flex_attention(
        q, k, v, alibi, create_block_mask(masks.causal_mask, None, None, 70, 70, "cpu"), return_aux=AuxRequest(lse=True)
    )
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(our_aux.lse, aux.lse)
    assert our_aux.max_scores is None


def test_it_agrees_with_scaled_dot_product_attention() -> None:
    q, k, v = qkv(H=8, Hkv=2)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.2)
    out = flex_attention(q, k, v, mask_mod=masks.causal_mask, enable_gqa=True, scale=0.2)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_lse_and_max_scores_are_those_of_the_modified_scores(backend: str) -> None:
    q, k, v = qkv(dtype=torch.float64)
    out, aux = flex_attention(
        q, k, v, mods.softcap(2.0), mask_mod=masks.causal(3), return_aux=AuxRequest(True, True), backend=backend
    )
    scores = 2 * torch.tanh(q @ k.mT / 4 / 2)
    keep = torch.ones(50, 50, dtype=torch.bool).tril(3)
    scores = scores.masked_fill(~keep, -math.inf)
    torch.testing.assert_close(aux.lse, scores.logsumexp(-1))
    torch.testing.assert_close(aux.max_scores, scores.amax(-1))
    assert not aux.max_scores.requires_grad
    pair = flex_attention(q, k, v, mods.softcap(2.0), mask_mod=masks.causal(3), return_lse=True, backend=backend)
    assert torch.equal(pair[0], out)
    assert torch.equal(pair[1], aux.lse)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_a_row_that_attends_to_nothing_is_zero_with_zero_gradients(backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in qkv())

    def later_half(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= 25) & (kv_idx < 25) & (h != 2)

    out, lse = flex_attention(q, k, v, mask_mod=later_half, return_lse=True, backend=backend)
    assert torch.equal(out[:, :, :25], torch.zeros_like(out[:, :, :25]))
    assert torch.equal(out[:, 2], torch.zeros_like(out[:, 2]))
    assert (lse[:, :, :25] == -math.inf).all() and (lse[:, 2] == -math.inf).all()
    (out.square().sum() + lse[:, :2, 25:].sum()).backward()
    for t in (q, k, v):
        assert t.grad is not None and t.grad.isfinite().all()
    assert q.grad is not None and (q.grad[:, :, :25] == 0).all() and (q.grad[:, 2] == 0).all()
    assert k.grad is not None and (k.grad[:, :, 25:] == 0).all()
    assert (k.grad[:, :2, :25] != 0).any()


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_nan_in_masked_places_of_a_captured_tensor_does_not_leak(backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in qkv())
    bias = torch.randn(50, 50).masked_fill(~torch.ones(50, 50, dtype=torch.bool).tril(), math.nan).requires_grad_()
    out = flex_attention(
        q, k, v, lambda s, b, h, i, j: s * bias[i, j].exp() + bias[i, j], mask_mod=masks.causal_mask, backend=backend
    )
    out.square().sum().backward()
    for t in (out, q.grad, k.grad, v.grad, bias.grad):
        assert t is not None and t.isfinite().all()
    assert bias.grad is not None and (bias.grad.triu(1) == 0).all() and (bias.grad.tril() != 0).any()


def test_one_tensor_indexed_twice_gets_both_gradients() -> None:
    q, k, v = qkv(B=1, H=1, Hkv=1, L=9, S=9, dtype=torch.float64)
    pair = torch.randn(9, 9, dtype=torch.float64, requires_grad=True)
    out = flex_attention(q, k, v, lambda s, b, h, i, j: s + pair[i, j] + pair[j, i])
    weights = torch.softmax(q[0, 0] @ k[0, 0].mT / 4 + pair + pair.mT, -1)
    expected = torch.autograd.grad((weights @ v[0, 0]).sin().sum(), pair)[0]
    torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), pair)[0], expected)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_gradcheck(backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in qkv(1, 2, 1, 5, 7, 3, 2, dtype=torch.float64))
    slopes = torch.rand(2, dtype=torch.float64, requires_grad=True)
    cap = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, cap: Tensor) -> tuple[Tensor, Tensor]:
        return flex_attention(
            q,
            k,
            v,
            lambda s, b, h, i, j: cap * torch.tanh(s / cap) + slopes[h] * (j - i),
            mask_mod=lambda b, h, i, j: i + 1 >= j,
            enable_gqa=True,
            return_lse=True,
            backend=backend,
        )

    assert torch.autograd.gradcheck(call, (q, k, v, slopes, cap))


def test_negative_indices_wrap_and_the_border_stands_in_for_what_is_beyond() -> None:
    q, k, v = qkv(B=1, H=1, Hkv=1, L=4, S=4)
    t = torch.randn(4)
    for backend in ("tiled", "reference"):
        wrapped = flex_attention(q, k, v, lambda s, b, h, i, j: s + t[i - j], backend=backend)
        index = torch.arange(4).view(-1, 1) - torch.arange(4)
        plain = torch.softmax(q @ k.mT / 4 + t[index], -1) @ v
        torch.testing.assert_close(wrapped, plain)
        beyond = flex_attention(q, k, v, lambda s, b, h, i, j: s + t[i + j], backend=backend)
        clamped = torch.softmax(q @ k.mT / 4 + t[(torch.arange(4).view(-1, 1) + torch.arange(4)).clamp(max=3)], -1) @ v
        torch.testing.assert_close(beyond, clamped)


def test_debug_mode_names_the_index_out_of_range_and_ignores_masked_ones() -> None:
    q, k, v = qkv(B=1, H=2, Hkv=2, L=40, S=40)
    t = torch.zeros(2, 30)
    mod = lambda s, b, h, i, j: s + t[h, i - j]
    with flexattn.debug_mode():
        flex_attention(q, k, v, mod, mask_mod=masks.sliding_window(30))
        message = (
            r"index 30 is out of range for dimension 1 \(size 30\) of captured tensor t of shape \[2, 30\], "
            r"read as t\[h, q_idx - kv_idx\] at b=0, h=0, q_idx=30, kv_idx=0"
        )
        with pytest.raises(IndexError, match=message):
            flex_attention(q, k, v, mod, mask_mod=masks.sliding_window(31))
    flex_attention(q, k, v, mod, mask_mod=masks.sliding_window(31))


@pytest.mark.parametrize("layout", ["BLHE", "expanded", "sliced", "BHEL"])
def test_strides_are_respected_and_the_output_has_the_querys_order(layout: str) -> None:
    q, k, v = qkv(H=4, Hkv=4, L=33, S=33)
    expected = flex_attention(q, k, v, mask_mod=masks.causal_mask)

    def arrange(t: Tensor) -> Tensor:
        if layout == "BLHE":
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "BHEL":
            return t.mT.contiguous().mT
        if layout == "sliced":
            return torch.cat([t, t], -1)[..., : t.shape[-1]]
        return t

    q, k, v = (arrange(t) for t in (q, k, v))
    if layout == "expanded":
        k, v = (t[:, :1].expand(-1, 4, -1, -1) for t in (k, v))
        expected = flex_attention(q, k.contiguous(), v.contiguous(), mask_mod=masks.causal_mask)
    out = flex_attention(q, k, v, mask_mod=masks.causal_mask)
    torch.testing.assert_close(out, expected)
    if layout == "BLHE":
        assert out.transpose(1, 2).is_contiguous()
        assert out.transpose(1, 2).flatten(2)._base is not None  # merging the heads is a view


def test_autocast_runs_in_its_dtype() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        assert flex_attention(q, k, v).dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_outputs_have_documented_dtypes(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype=dtype)
    out, lse = flex_attention(q, k, v, return_lse=True)
    assert out.dtype is dtype
    assert lse.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


def test_a_mask_mod_is_built_once_for_unchanged_tensors() -> None:
    from flexattn import mask_cache

    q, k, v = qkv(L=400, S=400)
    docs = torch.arange(400) // 150
    mask_cache._cache.clear()
    make = lambda: lambda b, h, i, j: docs[i] == docs[j]
    first = flex_attention(q, k, v, mask_mod=make())
    assert torch.equal(flex_attention(q, k, v, mask_mod=make()), first)
    assert len(mask_cache._cache) == 1
    docs[:] = torch.arange(400) // 300  # other blocks, not only other elements
    changed = flex_attention(q, k, v, mask_mod=make())
    assert not torch.equal(changed, first)
    fresh = create_block_mask(make(), None, None, 400, 400, "cpu")
    assert torch.equal(changed, flex_attention(q, k, v, block_mask=fresh))


def test_window_sizes_do_not_share_a_cached_mask() -> None:
    q, k, v = qkv(L=300, S=300)
    for limit in (3, 200, 290.5):
        mask = lambda b, h, i, j, limit=limit: (i >= j) & (i - j < limit)
        dense = flex_attention(q, k, v, mask_mod=mask, backend="reference")
        torch.testing.assert_close(flex_attention(q, k, v, mask_mod=mask), dense)


REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": torch.randn(4, 50, 16)}, ValueError, r"query has shape \(4, 50, 16\); it must be \[batch, heads"),
    ({"query": "q"}, TypeError, "query is a str"),
    ({"query": torch.zeros(2, 4, 50, 16, dtype=torch.int32)}, ValueError, "dtype torch.int32; use one of float16"),
    ({"key": torch.randn(2, 4, 50, 16).half()}, ValueError, "differ in dtype"),
    ({"key": torch.randn(2, 4, 50, 8)}, ValueError, "differ in head_dim: 16 and 8"),
    ({"key": torch.randn(2, 4, 49, 16)}, ValueError, "key and value differ in batch, heads or length"),
    ({"query": torch.randn(3, 4, 50, 16)}, ValueError, "batch of key and value is 2; it must be query's, 3, or 1"),
    ({"query": torch.randn(2, 8, 50, 16)}, ValueError, "pass enable_gqa=True"),
    ({"query": torch.randn(2, 6, 50, 16), "enable_gqa": True}, ValueError, "6 heads cannot be divided among 4"),
    ({"return_lse": True, "return_aux": AuxRequest(lse=True)}, ValueError, "both return_lse and return_aux"),
    ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'; choose one of 'auto', 'triton', 'tiled', 'reference'"),
    ({"scale": torch.tensor(1.0)}, TypeError, "scale is a Tensor"),
    ({"kernel_options": {"BLOK_M": 64}}, ValueError, "unknown kernel option 'BLOK_M'; did you mean 'BLOCK_M'"),
    ({"kernel_options": {"fwd_FOO": 1}}, ValueError, "unknown kernel option 'fwd_FOO'"),
    ({"kernel_options": {"BLOCK_M": 48}}, ValueError, "'BLOCK_M' is 48; it must be a power of two"),
    ({"kernel_options": {"BACKEND": "FLASH"}}, ValueError, '"AUTO" or "TRITON"'),
    ({"kernel_options": [1]}, TypeError, "kernel_options is a list"),
    ({"block_mask": masks.causal_mask}, TypeError, "a mask function is passed as mask_mod="),
    ({"block_mask": torch.ones(50, 50)}, TypeError, "not a flexattn.BlockMask"),
    (
        {"block_mask": create_block_mask(masks.causal_mask, 3, 1, 50, 50, "cpu")},
        ValueError,
        "B=3 but query has batch 2",
    ),
    (
        {"block_mask": create_block_mask(masks.causal_mask, 1, 2, 50, 50, "cpu")},
        ValueError,
        "H=2 but query has heads 4",
    ),
    (
        {"block_mask": create_block_mask(masks.causal_mask, 1, 1, 64, 50, "cpu")},
        ValueError,
        r"\(64, 50\), query and key have",
    ),
    (
        {"block_mask": create_block_mask(masks.causal_mask, 1, 1, 50, 50, "cpu"), "mask_mod": masks.causal_mask},
        ValueError,
        "both block_mask and mask_mod",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS, ids=[m[:40] for _, _, m in REFUSALS])
def test_bad_input_is_refused_by_name(change: dict[str, Any], error: type[Exception], message: str) -> None:
    query, key, value = qkv()
    with pytest.raises(error, match=message):
        flex_attention(**{"query": query, "key": key, "value": value, **change})


def test_a_captured_tensor_on_another_device_is_refused() -> None:
    q, k, v = qkv()
    elsewhere = torch.ones(4, device="meta")
    with pytest.raises(ValueError, match=r"captures a tensor of shape \(4,\) on meta, query is on cpu; move it once"):
        flex_attention(q, k, v, lambda s, b, h, i, j: s + elsewhere[h])


def test_no_heads_and_no_batch_are_sizes_too() -> None:
    for B, H in ((0, 2), (2, 0)):
        q = torch.randn(B, H, 5, 4, requires_grad=True)
        out = flex_attention(q, q, q, mask_mod=masks.causal_mask)
        assert out.shape == (B, H, 5, 4)
        by_both = create_block_mask(lambda b, h, i, j: i >= j + b + h, B, H, 5, 5, "cpu")
        assert flex_attention(q, q, q, block_mask=by_both).shape == (B, H, 5, 4)
        out.sum().backward()


def test_a_nested_tensor_is_refused_with_the_packed_alternative() -> None:
    nested = torch.nested.nested_tensor([torch.randn(4, 3, 8), torch.randn(4, 5, 8)], layout=torch.jagged)
    with pytest.raises(NotImplementedError, match="document_mask"):
        flex_attention(nested, nested, nested)


def test_pytorchs_block_mask_is_refused_with_the_conversion_that_works() -> None:
    q, k, v = qkv()
    m = peer.create_block_mask(masks.causal_mask, 1, 1, 50, 50, device="cpu")
    with pytest.raises(TypeError, match=r"flexattn\.BlockMask\.from_torch") as caught:
        flex_attention(q, k, v, block_mask=m)  # type: ignore[call-overload]
    code = str(caught.value).split("converts by ")[1].split(";")[0]
    out = flex_attention(q, k, v, block_mask=eval(code, {"flexattn": flexattn, "block_mask": m}))
    torch.testing.assert_close(out, flex_attention(q, k, v, mask_mod=masks.causal_mask))


def test_known_kernel_options_change_nothing_here() -> None:
    q, k, v = qkv()
    options = {
        "BLOCK_M": 64,
        "bwd_BLOCK_N1": 32,
        "num_warps": 4,
        "USE_TMA": True,
        "BACKEND": "AUTO",
        "PRESCALE_QK": True,
    }
    assert torch.equal(flex_attention(q, k, v, kernel_options=options), flex_attention(q, k, v))


def test_double_backward_is_refused_not_wrong() -> None:
    q, k, v = (t.requires_grad_() for t in qkv())
    (grad,) = torch.autograd.grad(flex_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        (grad.sum() + q.sum()).backward()


_MEMORY = """
import sys, torch, flexattn
S = int(sys.argv[1])
torch.set_num_threads(1)
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
def call(S):
    q, k, v = (torch.randn(1, 1, S, 16, requires_grad=True) for _ in range(3))
    slopes = torch.ones(1)
    mask = flexattn.create_block_mask(flexattn.masks.sliding_window(256), None, None, S, S, "cpu")
    flexattn.flex_attention(q, k, v, lambda s, b, h, i, j: s + slopes[h] * (j - i), mask).sum().backward()
call(512)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = peak()
call(S)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc; run it on Linux")
def test_extra_memory_is_linear_in_the_length() -> None:
    def extra(S: int) -> int:
        run = subprocess.run([sys.executable, "-c", _MEMORY, str(S)], capture_output=True, text=True, check=True)
        return int(run.stdout)  # KiB

    # 32k x 32k scores would be 4 GiB; linear growth from 8k to 32k is a factor of four, plus fixed buffers.
    small, large = extra(8192), extra(32768)
    assert small > 8192 * 16 * 4 * 4 / 1024, "the measurement sees at least the tensors themselves"
    assert large < 4 * small + 32 * 1024
    assert large < 200 * 1024
