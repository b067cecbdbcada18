"""What a call on a GPU promises besides its result: memory, determinism, which kernels run, and what it says."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
from gpu.cases import DEVICE, Case, assert_right, qkv
from torch.profiler import ProfilerActivity, profile

import flexattn
from flexattn import create_block_mask, flex_attention, masks, mods
from flexattn.notices import say_once

LENGTHS = (4096, 8192, 16384, 32768)


def peak_of_a_step(S: int) -> int:
    """Bytes that a forward and backward add to what their inputs take, at the highest point."""
    heads = 4
    leaves = [t.requires_grad_() for t in qkv(1, heads, L=S)]
    slopes = mods.alibi_slopes(heads, DEVICE).requires_grad_()
    block_mask = create_block_mask(masks.causal_mask, None, None, S, S, DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = flex_attention(*leaves, mods.alibi(slopes), block_mask)
    grads = torch.autograd.grad(out, [*leaves, slopes], torch.ones_like(out))
    torch.cuda.synchronize()
    assert all(g.isfinite().all() for g in grads)
    return torch.cuda.max_memory_allocated() - before


def test_memory_of_forward_and_backward_is_linear_in_the_length() -> None:
    peak_of_a_step(512)  # what is allocated once
    peaks = {S: peak_of_a_step(S) for S in LENGTHS}
    tensors = 4096 * 4 * 64 * 2  # bytes of one of query, out, ... at the first length
    assert peaks[LENGTHS[0]] > 5 * tensors, "out, its gradient, dq, dk and dv at least are seen"
    for small, large in pairwise(LENGTHS):
        assert peaks[large] < 2.2 * peaks[small], peaks
    assert peaks[LENGTHS[-1]] < LENGTHS[-1] ** 2 / 2, f"not even half a byte for each score of one head: {peaks}"


@pytest.mark.parametrize("D", [64, 128])
def test_a_hundred_runs_are_the_same_to_the_bit(D: int) -> None:
    case = Case(*qkv(2, 8, 2, L=1000, E=D), mask=masks.causal_mask, options={"DETERMINISTIC": True})
    first = case.run()
    differing = {name for _ in range(99) for name, t in case.run().items() if not torch.equal(t, first[name])}
    assert differing == set()


def test_automatic_choice_takes_the_triton_kernels_and_says_nothing() -> None:
    say_once.cache_clear()
    q, k, v = (t.requires_grad_() for t in qkv(1, 2, L=300))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        flex_attention(q, k, v, mask_mod=masks.causal_mask).sum().backward()
    assert [str(w.message) for w in caught if "flex_attention" in str(w.message)] == []
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        flex_attention(q, k, v, mask_mod=masks.causal_mask).sum().backward()
        torch.cuda.synchronize()
    kernels = {e.name for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA}
    if not kernels:
        pytest.skip("the profiler sees no kernel at all: it needs CUPTI, and permission to use it")
    assert any(name.startswith("attention_forward") for name in kernels), kernels
    assert any(name.startswith("attention_backward") for name in kernels), kernels


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_naming_the_backend_changes_nothing(backend: str) -> None:
    case = Case(*qkv(1, 2, L=300), mask=masks.causal_mask, options={"DETERMINISTIC": True})
    named, other = case.run(backend), case.run()
    assert all(torch.equal(named[name], other[name]) for name in other)


# Tiles of few elements and many stages: larger ones are refused as well, after minutes in the compiler.
@pytest.mark.parametrize(
    ("dtype", "tiles"),
    [
        (torch.bfloat16, {"BLOCK_M": 128, "BLOCK_N": 128, "num_stages": 8}),
        (torch.float32, {"BLOCK_M": 16, "BLOCK_N": 128, "num_stages": 5}),
    ],
    ids=["bfloat16", "float32"],
)
def test_tiles_that_do_not_fit_are_refused_by_what_they_lack(dtype: torch.dtype, tiles: dict[str, int]) -> None:
    q, k, v = qkv(1, 1, L=512, E=256, dtype=dtype)
    with pytest.raises(ValueError, match="shared"):
        flex_attention(q, k, v, kernel_options={**tiles, "num_warps": 8})
    if dtype is torch.bfloat16:  # the refusal is of the options: the table's own choice fits
        assert_right(Case(q, k, v))


def test_explain_tells_what_the_compiled_kernels_need() -> None:
    slopes = mods.alibi_slopes(4, DEVICE)
    report = flexattn.explain(mods.alibi(slopes), masks.causal_mask, dtype=torch.bfloat16, quiet=True)
    assert "registers" in str(report)


def test_autocast_runs_in_its_dtype_and_gradients_arrive_in_the_inputs() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(1, 2, L=300, dtype=torch.float32))
    with torch.autocast("cuda", torch.bfloat16):
        out = flex_attention(q, k, v, mask_mod=masks.causal_mask)
    assert out.dtype is torch.bfloat16
    out.sum().backward()
    assert q.grad is not None and q.grad.dtype is torch.float32 and q.grad.isfinite().all()


def test_work_is_queued_on_the_current_stream() -> None:
    case = Case(*qkv(1, 4, L=1000), mask=masks.causal_mask, options={"DETERMINISTIC": True})
    expected = case.run()
    later = Case(torch.zeros_like(case.query), case.key, case.value, mask=case.mask, options=case.options)
    later.dout, later.dlse = case.dout, case.dlse
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # cycles: what runs on another stream reads the query too early
        later.query.copy_(case.query)
        results = later.run()
    side.synchronize()
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_a_call_does_not_wait_for_the_gpu() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(1, 4, L=1000))
    block_mask = create_block_mask(masks.causal_mask, None, None, 1000, 1000, DEVICE)
    flex_attention(q, k, v, block_mask=block_mask).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flex_attention(q, k, v, block_mask=block_mask).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
