"""The short ways of an eager call on a CPU: what is kept between calls, and calls past the dispatcher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flexattn
from flexattn import masks, mods, ops
from flexattn.backends import indices
from flexattn.codegen.trace import trace
from flexattn.operands import split

slopes = torch.tensor([0.5, 0.25])
CASES = {
    "none": (None, None),
    "causal": (None, masks.causal_mask),
    "alibi": (mods.alibi(slopes), masks.causal_mask),
    "softcap": (mods.softcap(20.0), None),
    "padding": (None, masks.padding(torch.tensor([3, 0]))),
    "window": (mods.softcap(20.0), masks.sliding_window(3)),
}


def tensors(L: int = 5, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, L, 4, generator=generator).to(**options) for _ in range(3)]


@pytest.mark.parametrize("L", [5, 300])
@pytest.mark.parametrize("case", CASES)
def test_the_dispatcher_changes_nothing(case: str, L: int) -> None:
    score_mod, mask_mod = CASES[case]
    block = None if mask_mod is None else flexattn.create_block_mask(mask_mod, 2, None, L, L, "cpu")
    lists = () if block is None else block.kv_lists()
    program, captured, ints = trace(score_mod, mask_mod)
    inside, floats = split(captured, program)
    results = []
    for call in (ops.attention, ops.FORWARD):
        q, k, v = (t.requires_grad_() for t in tensors(L))
        out, lse, max_scores = call(q, k, v, inside, list(lists), ints, floats, [128, 128], program, 0.5, "tiled", "")
        assert not max_scores.requires_grad
        loss = out.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()
        results.append((out, lse, max_scores, *torch.autograd.grad(loss, (q, k, v))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_small_problem_has_the_results_of_the_reference(case: str, dtype: torch.dtype, transposed: bool) -> None:
    score_mod, mask_mod = CASES[case]
    q, k, v = tensors(dtype=dtype)
    if transposed:
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    aux = flexattn.AuxRequest(lse=True, max_scores=True)
    found, expected = (
        flexattn.flex_attention(q, k, v, score_mod, mask_mod=mask_mod, return_aux=aux, backend=backend)
        for backend in ("tiled", "reference")
    )
    assert found[0].dtype is dtype and found[0].stride() == expected[0].stride()
    torch.testing.assert_close(found, expected)


def test_who_watches_sees_the_operator() -> None:
    q, k, v = tensors()
    seen: list[str] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watching():
        flexattn.flex_attention(q, k, v)
    assert seen[0] == "flexattn.forward.default"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        flexattn.flex_attention(q, k, v)
    assert "flexattn::forward" in {event.key for event in profile.key_averages()}


def test_block_lists_that_are_written_to_are_read_anew() -> None:
    q, k, v = tensors(4)
    count, index = torch.ones(1, 1, 2, dtype=torch.int32), torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)
    block = flexattn.BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=2)
    first = flexattn.flex_attention(q, k, v, block_mask=block)
    block.kv_indices.copy_(block.kv_indices.flip(2))
    second = flexattn.flex_attention(q, k, v, block_mask=block)
    expected = flexattn.flex_attention(q, k, v, block_mask=block, backend="reference")
    torch.testing.assert_close(second, expected)
    assert not torch.allclose(first, second)


def test_what_inference_mode_has_kept_serves_training() -> None:
    indices.kept_place_of.cache_clear()
    indices.number.cache_clear()
    score_mod, mask_mod = CASES["alibi"]
    with torch.inference_mode():
        flexattn.flex_attention(*tensors(), score_mod, mask_mod=mask_mod)
    q, k, v = (t.requires_grad_() for t in tensors())
    weight = slopes.clone().requires_grad_()
    out = flexattn.flex_attention(q, k, v, mods.alibi(weight), mask_mod=mask_mod)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v, weight))
    dense = flexattn.flex_attention(q, k, v, mods.alibi(weight), mask_mod=mask_mod, backend="reference")
    torch.testing.assert_close(grads, torch.autograd.grad(dense.square().sum(), (q, k, v, weight)))


def test_only_small_values_are_kept() -> None:
    program = trace(*CASES["alibi"]).program
    for stop, kept in ((8, True), (512, False)):
        corner = indices.Corner((0, 1), (0, 2), 1, (0, stop), ((0, stop),), True)
        place = indices.place_of(program, corner, torch.device("cpu"), ((2,),))
        assert bool(place.memo) == bool(place.wrapped) == kept


def test_captured_values_are_those_of_each_call() -> None:
    q, k, v = tensors()
    bias = torch.tensor([1.0, 2.0])
    for table in (bias, torch.rand(2, 3)[:, 1], torch.rand(1), torch.rand(5)):
        for _ in range(2):
            for mod in (
                lambda s, b, h, q, k, t=table: s + t[h],
                lambda s, b, h, q, k, t=table: s + t[q - 3],  # wraps, and reads the border
                lambda s, b, h, q, k, t=table: s * t[k],
            ):
                found, expected = (flexattn.flex_attention(q, k, v, mod, backend=b) for b in ("tiled", "reference"))
                torch.testing.assert_close(found, expected)
            table += 1


def test_rows_without_keys_beside_rows_of_nan() -> None:
    q, k, v = tensors()
    q[:, :, 0] = float("nan")
    keep = torch.ones(5, dtype=torch.bool)
    keep[1] = False
    mask = lambda b, h, q, k: keep[q]
    out, aux = flexattn.flex_attention(q, k, v, mask_mod=mask, return_aux=flexattn.AuxRequest(lse=True))
    assert out[:, :, 0].isnan().all() and (out[:, :, 1] == 0).all() and out[:, :, 2:].isfinite().all()
    assert aux.lse is not None and (aux.lse[:, :, 1] == float("-inf")).all()


def test_a_mask_that_was_first_used_in_inference_mode_can_be_trained_with() -> None:
    x = torch.randn(1, 2, 67, 8, dtype=torch.float64)
    ids = torch.arange(67) // 20
    with torch.inference_mode():
        flexattn.flex_attention(x, x, x, mask_mod=masks.document_mask(ids))
        made = flexattn.create_block_mask(masks.causal_mask, None, None, 67, 67, "cpu")
    y = x.clone().requires_grad_()
    for options in ({"mask_mod": masks.document_mask(ids)}, {"block_mask": made}):
        expected = flexattn.flex_attention(y, y, y, backend="reference", **options)
        found = flexattn.flex_attention(y, y, y, **options)
        torch.testing.assert_close(found, expected)
        for actual, wanted in zip(*(torch.autograd.grad(t.square().sum(), y) for t in (found, expected)), strict=True):
            torch.testing.assert_close(actual, wanted)
