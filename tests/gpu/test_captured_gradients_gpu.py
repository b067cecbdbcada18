"""Gradients of learned tensors on a GPU: right in every pattern, the same bits in every run, without waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from gpu.cases import DEVICE, Case, Mod, assert_results, assert_right, qkv
from torch import Tensor

from flexattn import AuxRequest, create_block_mask, flex_attention, masks
from flexattn.backends import collection

B, H, LENGTH = 2, 4, 1000
STRICT = {"DETERMINISTIC": True}


def parameter(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE) * 0.3


def bucket(distance: Tensor) -> Tensor:
    """That of T5, with 32 buckets."""
    far = 16 + torch.log(distance.clamp(min=1) / 16) / 2.0794 * 16
    return torch.where(distance < 16, distance, far.to(torch.int64).clamp(max=31))


GROUP = torch.arange(LENGTH) * 7 % 16


def routed(t: Tensor) -> Mod:
    group = GROUP.to(t.device)
    return lambda s, b, h, q, kv: s + t[group[q], group[kv]]


# What makes the score_mod of learned tensors, and their shapes.
LEARNED: dict[str, tuple[Callable[..., Mod], list[tuple[int, ...]]]] = {
    "gain": (lambda t: lambda s, b, h, q, kv: s * t, [()]),
    "slopes": (lambda t: lambda s, b, h, q, kv: s + t[h] * (kv - q) * 0.01, [(H,)]),
    "forgetting gates": (lambda t: lambda s, b, h, q, kv: s + t[b, h, q] - t[b, h, kv], [(B, H, LENGTH)]),
    "T5 buckets": (lambda t: lambda s, b, h, q, kv: s + t[bucket((q - kv).clamp(min=0)), h], [(32, H)]),
    "relative": (lambda t: lambda s, b, h, q, kv: s + t[h, q - kv + LENGTH - 1], [(H, 2 * LENGTH - 1)]),
    "pair of each head": (lambda t: lambda s, b, h, q, kv: s + t[b, h, q, kv], [(B, H, LENGTH, LENGTH)]),
    "pair, shared": (lambda t: lambda s, b, h, q, kv: s + t[kv, q], [(LENGTH, LENGTH)]),
    "routed": (routed, [(16, 16)]),
    "by the score": (lambda t: lambda s, b, h, q, kv: s + t[(s.clamp(-3, 3) * 2).long()], [(14,)]),
    "everywhere": (
        lambda t, u: (
            lambda s, b, h, q, kv: s * torch.sigmoid(t[h, q]) + t[h, kv] * u[q, kv] + u[kv, q] + t[h, abs(q - kv)]
        ),
        [(H, LENGTH), (LENGTH, LENGTH)],
    ),
}


def case(name: str, **more: Any) -> Case:
    score, shapes = LEARNED[name]
    captured = tuple(parameter(*shape) for shape in shapes)
    return Case(*qkv(B, H, 2, L=LENGTH), score=score, captured=captured, mask=masks.causal_mask, **more)


@pytest.mark.parametrize("options", [None, STRICT], ids=["default", "deterministic"])
@pytest.mark.parametrize("name", [n for n in LEARNED if n != "by the score"])  # of which a rounding decides
def test_gradients_of_a_pattern_are_right(name: str, options: dict[str, Any] | None) -> None:
    assert_right(case(name, options=options))


@pytest.mark.parametrize("name", ["relative", "pair, shared", "everywhere"])
def test_a_grid_in_parts_gives_the_same(name: str) -> None:
    whole = case(name, options=STRICT)
    with patch.multiple(collection, WORKSPACE=1 << 20, BUSY=1):
        assert_results(whole, whole.run())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_16_bits_are_summed_in_32(dtype: torch.dtype) -> None:
    narrow = case("relative")
    narrow.captured = tuple(t.to(dtype) for t in narrow.captured)
    assert_right(narrow)


def differing(repeated: Case) -> set[str]:
    first = repeated.run()
    return {name for _ in range(20) for name, t in repeated.run().items() if not torch.equal(t, first[name])}


@pytest.mark.parametrize("name", LEARNED)
def test_twenty_runs_are_the_same_to_the_bit_where_that_is_promised(name: str) -> None:
    if name not in ("routed", "by the score"):
        assert differing(case(name)) == set()
    assert differing(case(name, options=STRICT)) == set()
    torch.use_deterministic_algorithms(True)
    try:
        assert differing(case(name)) == set()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("options", [None, STRICT], ids=["default", "deterministic"])
@pytest.mark.parametrize("name", LEARNED)
def test_a_step_does_not_wait_for_the_gpu(name: str, options: dict[str, Any] | None) -> None:
    score, shapes = LEARNED[name]
    captured = [parameter(*shape).requires_grad_() for shape in shapes]
    q, k, v = (t.requires_grad_() for t in qkv(B, H, L=LENGTH))
    block_mask = create_block_mask(masks.causal_mask, None, None, LENGTH, LENGTH, DEVICE)
    mod = score(*captured)

    def step() -> None:
        flex_attention(q, k, v, mod, block_mask, kernel_options=options).sum().backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["relative", "pair, shared", "routed"])
def test_a_cuda_graph_replays_on_new_parameters(name: str) -> None:
    captured_once = case(name, options=STRICT)
    captured_once.block_mask = create_block_mask(masks.causal_mask, None, None, LENGTH, LENGTH, DEVICE)
    if name == "routed":  # an index is no parameter: made before the capture
        group = GROUP.to(DEVICE)
        captured_once.score = lambda t: lambda s, b, h, q, kv: s + t[group[q], group[kv]]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            captured_once.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = captured_once.run()
    for t in (captured_once.query, captured_once.dout, *captured_once.captured):
        t.copy_(torch.randn_like(t))
    graph.replay()
    again = captured_once.run()
    assert all(torch.equal(replayed[key], again[key]) for key in again)


def test_memory_does_not_grow_with_the_square_of_the_length_for_a_relative_bias() -> None:
    peaks = []
    for n in (4096, 8192, 16384):
        q, k, v = (t.requires_grad_() for t in qkv(1, 16, L=n))
        table = parameter(16, 2 * n - 1).requires_grad_()
        out = flex_attention(q, k, v, lambda s, b, h, i, j, t=table, n=n: s + t[h, i - j + n - 1])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out.backward(torch.ones_like(out))
        peaks.append(torch.cuda.max_memory_allocated() - before - collection.WORKSPACE)
    assert peaks[2] < 4.4 * max(peaks[0], 1 << 26), peaks


def test_a_bucket_of_the_kernel_is_that_of_the_gradient() -> None:
    """The kernel computes the index that is read, torch that of the sums along diagonals: no rounding may part them."""
    n = 1 << 20
    q, k = torch.zeros(1, 1, n, 16, device=DEVICE, dtype=torch.bfloat16), torch.zeros(1, 1, 1, 16, device=DEVICE)
    number = torch.arange(32.0, device=DEVICE)
    _, aux = flex_attention(
        q, k.bfloat16(), k.bfloat16(), lambda s, b, h, i, j: s + number[bucket((i - j).clamp(min=0))],
        return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    assert torch.equal(aux.lse[0, 0], bucket(torch.arange(n, dtype=torch.int32, device=DEVICE)).float())
