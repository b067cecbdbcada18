"""Attention on a GPU inside torch.compile and inside CUDA graphs: the same bits as in eager code."""

from __future__ import annotations

import pytest
import torch
from gpu.cases import DEVICE, Case, Results, assert_results, qkv
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from flexattn import BlockMask, and_masks, create_block_mask, flex_attention, masks, mods

pytestmark = pytest.mark.feature('CUDA graphs and mode="reduce-overhead"')

H, LENGTH = 4, 700
REPEATABLE = {"DETERMINISTIC": True}  # a backward in one pass adds to dQ in any order


def assert_same_bits(actual: Results, expected: Results) -> None:
    """Equal, but for the gradients of captured tensors, whose sums have no fixed order."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        if not name.startswith("d captured"):
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind", ["no mask", "causal", "documents"])
def test_compiled_and_eager_attention_are_the_same_to_the_bit(kind: str) -> None:
    ids = (torch.rand(2, LENGTH, device=DEVICE) < 0.01).cumsum(-1)
    documents = and_masks(masks.document_mask(ids), masks.causal_mask)
    mask = {"no mask": None, "causal": masks.causal_mask, "documents": documents}[kind]
    block_mask = None if mask is None else create_block_mask(mask, 2, None, LENGTH, LENGTH, DEVICE)
    slopes = mods.alibi_slopes(H, DEVICE)
    case = Case(*qkv(2, H, 2, L=LENGTH), mask=mask, block_mask=block_mask, score=mods.alibi, captured=(slopes,))
    case.options = REPEATABLE
    eager = case.run()
    compiled = case.run(attend=torch.compile(flex_attention, fullgraph=True))
    assert_same_bits(compiled, eager)
    assert_results(case, compiled)


def test_a_layer_that_is_compiled_whole_is_the_same_to_the_bit() -> None:
    block_mask = create_block_mask(masks.causal_mask, None, None, LENGTH, LENGTH, DEVICE)

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        mod = lambda score, b, h, q_idx, kv_idx: torch.where(q_idx > kv_idx, score * gate[h], score - 0.5)
        return flex_attention(q, k, v, mod, block_mask, return_lse=True, kernel_options=REPEATABLE)

    leaves = [t.requires_grad_() for t in (*qkv(2, H, L=LENGTH), torch.rand(H, device=DEVICE))]
    seeds = [torch.randn_like(leaves[0]), torch.randn(2, H, LENGTH, device=DEVICE)]
    found = []
    for function in (attend, torch.compile(attend, fullgraph=True)):
        outputs = function(*leaves)
        found.append([*outputs, *torch.autograd.grad(outputs, leaves[:3], seeds)])
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(compiled, eager)


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask made inside"])
def test_lengths_are_dynamic_in_one_compiled_graph(masked: bool) -> None:
    slopes = mods.alibi_slopes(H, DEVICE)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        block_mask: BlockMask | None = None
        if masked:
            sizes = (q.shape[2], k.shape[2])
            block_mask = create_block_mask(lambda b, h, i, j: i + 100 >= j, None, None, *sizes, device=q.device)
        mod = lambda s, b, h, i, j: s + slopes[h] * (j - i)
        return flex_attention(q, k, v, mod, block_mask, kernel_options=REPEATABLE)

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for L, S in ((515, 700), (256, 300), (1024, 129)):
        leaves = [t.requires_grad_() for t in qkv(2, H, L=L, S=S)]
        seed = torch.randn_like(leaves[0])
        results = []
        for function in (attend, compiled):
            out = function(*leaves)
            results.append([out, *torch.autograd.grad(out, leaves, seed)])
        for eager, dynamic in zip(*results, strict=True):
            assert torch.equal(dynamic, eager)
    assert counter.frame_count == 1


@pytest.mark.parametrize("learned", [False, True], ids=["fixed mod", "learned mod"])
def test_a_cuda_graph_of_forward_and_backward_replays_on_new_inputs(learned: bool) -> None:
    ids = (torch.rand(LENGTH, device=DEVICE) < 0.01).cumsum(0)
    mask = and_masks(masks.document_mask(ids), masks.causal_mask)
    block_mask = create_block_mask(mask, None, None, LENGTH, LENGTH, DEVICE)
    case = Case(*qkv(2, H, 2, L=LENGTH), mask=mask, block_mask=block_mask, options=REPEATABLE)
    if learned:
        case.score, case.captured = mods.alibi, (mods.alibi_slopes(H, DEVICE),)
    else:
        case.score = lambda: mods.softcap(2.0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile and choose configurations before the capture
        for _ in range(2):
            case.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = case.run()
    for _ in range(2):
        for t in (case.query, case.key, case.value, case.dout, case.dlse):
            t.copy_(torch.randn_like(t))
        for t in case.captured:
            t.copy_(torch.rand_like(t))
        graph.replay()
        assert_same_bits(replayed, case.run())
        assert_results(case, replayed)


def test_training_by_cuda_graphs_of_torch_compile() -> None:
    """mode="reduce-overhead": with run-time floats, learned tensors and block masks no graph is left out."""
    block_mask = create_block_mask(masks.causal_mask, None, None, LENGTH, LENGTH, DEVICE)
    slopes = mods.alibi_slopes(H, DEVICE).requires_grad_()
    cap = 20.0

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return cap * torch.tanh((score + slopes[h] * (kv_idx - q_idx)) / cap)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q.sin(), k, v, mod, block_mask).square().sum()

    counters["inductor"].clear()
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for _ in range(5):
        leaves = [t.requires_grad_() for t in qkv(2, H, L=LENGTH)]
        found = []
        for function in (step, compiled):
            torch.compiler.cudagraph_mark_step_begin()
            grads = torch.autograd.grad(function(*leaves), [*leaves, slopes])
            found.append([g.clone() for g in grads])
        for eager, graphed in zip(*found, strict=True):
            torch.testing.assert_close(graphed, eager, rtol=1.6e-2, atol=1e-2)  # Inductor's sin is another
    assert counters["inductor"]["cudagraph_skips"] == 0
