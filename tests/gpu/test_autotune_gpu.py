"""Tuning on a GPU: the same results, chosen once, in bounded time, also in compiled models and under CUDA graphs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.cases import DEVICE, Case, assert_results, qkv

from flexattn import create_block_mask, flex_attention, masks, mods, tuning_cache

H, LENGTH = 4, 1000
PASSES = ["dkdv", "dq", "forward"]
TUNED = {"AUTOTUNE": True}


@pytest.fixture(autouse=True)
def _untuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process with an empty cache."""
    monkeypatch.setenv("FLEXATTN_CACHE_DIR", str(tmp_path))
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexattn.backends import autotune, launch

    monkeypatch.setattr(launch, "_CHOSEN", {})
    monkeypatch.setattr(autotune, "_FASTEST", {})


def refuse_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexattn.backends import autotune

    def refused(device: torch.device) -> Any:
        raise AssertionError("something is timed")

    monkeypatch.setattr(autotune, "event_timer", refused)


def alibi_case(options: dict[str, Any] | None, length: int = LENGTH) -> Case:
    torch.manual_seed(0)
    block_mask = create_block_mask(masks.causal_mask, None, None, length, length, DEVICE)
    case = Case(*qkv(2, H, 2, L=length), mask=masks.causal_mask, block_mask=block_mask, options=options)
    case.score, case.captured = mods.alibi, (mods.alibi_slopes(H, DEVICE),)
    return case


def passes() -> list[str]:
    return sorted(entry.facts["pass"] for entry in tuning_cache.entries() if "pass" in entry.facts)


def test_tuned_kernels_are_right_and_the_second_process_reads_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, table = alibi_case(TUNED), alibi_case(None)
    results = tuned.run()
    assert_results(tuned, results)
    expected = table.run()
    for name in ("out", "lse", "max_scores", "dq", "dk", "dv"):
        torch.testing.assert_close(results[name], expected[name], rtol=2e-2, atol=2e-2)
    assert set(PASSES) <= set(passes())
    forget(monkeypatch)
    refuse_timing(monkeypatch)
    for name, found in tuned.run().items():
        assert torch.equal(found, results[name]), name


def test_gradients_that_atomics_collect_have_nothing_of_the_runs_that_were_timed() -> None:
    case = alibi_case(TUNED)
    index = torch.randint(7, (LENGTH,), device=DEVICE)
    case.score = lambda table: lambda score, b, h, q_idx, kv_idx: score + table[index[q_idx] * index[kv_idx] % 7]
    case.captured = (torch.rand(7, device=DEVICE),)
    assert_results(case, case.run())


def test_the_time_of_tuning_is_bounded() -> None:
    from flexattn.backends import autotune

    case = alibi_case(TUNED, length=8192)
    case.run()  # compiles what the table recommends, and the candidates
    tuning_cache.clear()
    with pytest.MonkeyPatch.context() as patch:
        forget(patch)
        torch.cuda.synchronize()
        start = time.perf_counter()
        case.run()
        torch.cuda.synchronize()
        assert time.perf_counter() - start < 3 * (autotune.SECONDS + 5)
    assert all(len(entry.milliseconds) <= 1 + autotune.COMPILED for entry in tuning_cache.entries())


def test_the_choice_is_the_fastest_up_to_the_gain_that_another_must_have() -> None:
    alibi_case(TUNED, length=4096).run()
    entries = [entry for entry in tuning_cache.entries() if "pass" in entry.facts]
    assert entries
    for entry in entries:
        words = ", ".join(f"{name}={value}" for name, value in entry.choice.items())
        assert entry.milliseconds[words] <= min(entry.milliseconds.values()) / 0.98


def test_a_compiled_model_tunes_and_its_cuda_graphs_replay() -> None:
    block_mask = create_block_mask(masks.causal_mask, None, None, LENGTH, LENGTH, DEVICE)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flex_attention(q, k, v, mods.softcap(20.0), block_mask, kernel_options=TUNED).square().sum()

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        leaves = [t.requires_grad_() for t in qkv(2, H, L=LENGTH)]
        found = []
        for function in (compiled, step):
            torch.compiler.cudagraph_mark_step_begin()
            found.append([g.clone() for g in torch.autograd.grad(function(*leaves), leaves)])
        for graphed, eager in zip(*found, strict=True):
            torch.testing.assert_close(graphed, eager, rtol=1.6e-2, atol=1e-2)
    assert set(PASSES) <= set(passes())


def test_the_capture_of_a_graph_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"BLOCKS_ARE_CONTIGUOUS": False}  # or else the capture, which reads no lists, needs other kernels
    plain, case = alibi_case(options), alibi_case(options | TUNED)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the table's kernels are compiled and loaded before the capture
        plain.run()
    torch.cuda.current_stream().wait_stream(side)
    refuse_timing(monkeypatch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = case.run()
    graph.replay()
    assert_results(case, replayed)
    assert tuning_cache.entries() == []
