"""The GPU benchmark, on a CPU at tiny shapes: its files, what it refuses to time, and the arithmetic of its goals."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
KEYS = {"case", "pass", "impl", "dtype", "B", "Hq", "Hkv", "S", "D", "ms", "tflops", "max_error", "run"}


@pytest.fixture(autouse=True)
def without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The modules of the benchmark, by name."""
    names = ("results", "timing", "gpu_suites", "gpu_problem", "gpu_contenders", "gpu_judge", "gpu_machine")
    sys.path.append(str(ROOT / "benchmarks"))
    donated = torch._functorch.config.donated_buffer
    try:
        modules = {n: importlib.import_module(n) for n in (*names, "gpu_goals", "gpu_report", "bench_gpu")}
        yield Namespace(**modules)
    finally:
        torch._functorch.config.donated_buffer = donated
        sys.path.remove(str(ROOT / "benchmarks"))
        for name, module in list(sys.modules.items()):
            if isinstance(module, ModuleType) and str(ROOT / "benchmarks") in str(getattr(module, "__file__", "")):
                del sys.modules[name]


def smoke(bench: Any, out: Path, *arguments: str) -> tuple[Any, list[Any]]:
    """A Bench of this process, and its tasks."""
    options = bench.bench_gpu.parser().parse_args(
        ["--smoke", "--rounds", "1", "--rep", "1", "--out", str(out), *arguments]
    )
    return bench.bench_gpu.Bench(options), bench.bench_gpu.chosen(options)


def records_of(out: Path) -> list[dict[str, Any]]:
    return list(json.loads(out.read_text())["records"])


def test_the_smoke_run_measures_every_case_and_the_next_one_has_nothing_left(tmp_path: Path) -> None:
    out = tmp_path / "smoke.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_gpu.py"), "--smoke", "--rep", "1", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert run.returncode == 0, run.stderr[-2000:]
    written = out.read_bytes()
    content = json.loads(written)
    assert content["machine"]["torch"] == torch.__version__
    records = content["records"]
    assert all(set(r) >= KEYS for r in records)
    ours = [r for r in records if r["impl"] == "flexattn" and r["pass"] in ("forward", "backward", "forward_backward")]
    cases = {"noop", "causal", "alibi", "softcap", "sliding_window", "document", "prefix_lm", "relative_bias"}
    assert {(r["case"], r["pass"]) for r in ours} == set(
        itertools.product(cases, ("forward", "backward", "forward_backward"))
    )
    assert all(r["ms"] > 0 and r["tflops"] > 0 and r["max_error"] < 0.1 for r in ours)
    assert {r["pass"] for r in records} >= {"first_call", "host", "matmul", "copy"}
    assert {r["case"] for r in records if r["impl"] == "sdpa_mask" and r["ms"]} == cases - {"noop", "causal", "softcap"}
    assert {r["S"] for r in ours} == {96, 160}

    page = (tmp_path / "README.md").read_text()
    assert "| causal | B1H2/1D16 | 96 | forward |" in page
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "smoke-ratios.png").stat().st_size > 5000
        assert "smoke-ratios.png" in page and "smoke-tflops.png" in page
    else:
        assert "Plots need matplotlib" in page

    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert again.returncode == 0 and "nothing is left to measure" in again.stderr
    assert out.read_bytes() == written


def test_a_run_that_is_out_of_time_goes_on_where_it_stopped(bench: Any, tmp_path: Path) -> None:
    out, chosen = tmp_path / "a.json", ("--cases", "causal", "document", "--lengths", "96", "--parts", "forward")
    first, tasks = smoke(bench, out, *chosen, "--impls", "flexattn", "sdpa_flash")
    measure = first.measure

    def measure_and_be_late(task: Any, parts: list[str]) -> None:
        measure(task, parts)
        first.deadline = 0.0

    first.measure = measure_and_be_late
    first.everything(tasks)
    done = [(r["case"], r["impl"]) for r in records_of(out) if r["pass"] == "forward"]
    assert done == [("causal", "flexattn"), ("causal", "sdpa_flash")]
    second, tasks = smoke(bench, out, *chosen, "--impls", "flexattn", "sdpa_flash")
    second.everything(tasks)
    assert [(r["case"], r["impl"]) for r in records_of(out) if r["pass"] == "forward"] == [
        *done,
        ("document", "flexattn"),
    ]


def test_a_run_that_ends_between_contenders_keeps_none_of_them(bench: Any, tmp_path: Path) -> None:
    made, tasks = smoke(bench, tmp_path / "a.json", "--cases", "causal", "--lengths", "96", "--parts", "forward")
    calls = itertools.count()

    def late_at_the_third(*names: str) -> None:
        if next(calls) == 3:
            raise bench.bench_gpu.OutOfTime

    made.check_time = late_at_the_third
    made.everything(tasks)
    assert [r["pass"] for r in made.records] == ["matmul", "copy"] * 2


def test_what_takes_minutes_to_compile_is_not_begun_at_the_end(bench: Any, tmp_path: Path) -> None:
    made, _ = smoke(bench, tmp_path / "a.json", "--seconds", "100")
    made.check_time("flexattn", "torch_flex_tuned")  # nothing is compiled on a CPU
    made.options.smoke = False
    made.check_time("flexattn", "torch_flex")
    with pytest.raises(bench.bench_gpu.OutOfTime):
        made.check_time("flexattn", "torch_flex_tuned")


@pytest.mark.parametrize("S", ["96", "160"])
@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_a_wrong_result_is_recorded_and_never_timed(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, S: str, name: str
) -> None:
    class Wrong(torch.autograd.Function):
        """Adds to one of out, dq, dk and dv, in the last row, what it is not to be."""

        @staticmethod
        def forward(ctx: Any, out: Any, q: Any, k: Any, v: Any) -> Any:
            ctx.save_for_backward(q, k, v)
            spoilt = out.clone()
            spoilt[:, :, -1] += 1.0 if name == "out" else 0.0
            return spoilt

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]
            grads = [torch.zeros_like(t) for t in ctx.saved_tensors]
            for spoilt, grad_name in zip(grads, ("dq", "dk", "dv"), strict=True):
                spoilt[:, :, -1] += 1.0 if name == grad_name else 0.0
            return grad, *grads

    def wrong(problem: Any) -> Any:
        attend = bench.gpu_contenders.ours(problem)
        return lambda q, k, v: Wrong.apply(attend(q, k, v), q, k, v)

    monkeypatch.setitem(bench.gpu_contenders.CONTENDERS, "torch_flex", {"": wrong})
    out = tmp_path / "a.json"
    made, tasks = smoke(bench, out, "--cases", "causal", "--lengths", S, "--parts", "forward")
    made.everything(tasks)
    (spoilt,) = (r for r in records_of(out) if r["impl"] == "torch_flex")
    assert spoilt["ms"] is None and spoilt["tflops"] is None
    assert f"wrong: the error of {name} is" in spoilt["error"]
    (ours,) = (r for r in records_of(out) if r["impl"] == "flexattn")
    assert ours["ms"] > 0
    assert "| causal | B1H2/1D16 |" in (page := bench.gpu_report.render(tmp_path).read_text()) and "| failed |" in page


def test_an_error_while_a_contender_is_timed_stops_nobody_else(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks_later(problem: Any) -> Any:
        attend, calls = bench.gpu_contenders.ours(problem), itertools.count()

        def attend_once(*leaves: torch.Tensor) -> Any:
            if next(calls):
                raise torch.OutOfMemoryError("no memory is left")
            return attend(*leaves)

        return attend_once

    monkeypatch.setitem(bench.gpu_contenders.CONTENDERS, "sdpa_flash", {"": breaks_later})
    made, tasks = smoke(bench, tmp_path / "a.json", "--cases", "causal", "--lengths", "96", "--parts", "forward")
    made.everything(tasks)
    found = {r["impl"]: r for r in made.records if r["pass"] == "forward"}
    assert found["sdpa_flash"]["error"] == "OutOfMemoryError: no memory is left"
    assert found["flexattn"]["ms"] > 0


def test_a_problem_that_cannot_be_judged_stops_no_other(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = bench.gpu_judge.Judge

    def too_large(problem: Any, every: int) -> Any:
        if problem.cell.case == "causal":
            raise torch.OutOfMemoryError("no memory is left")
        return judge(problem, every)

    monkeypatch.setattr(bench.bench_gpu, "Judge", too_large)
    chosen = ("--cases", "causal", "noop", "--lengths", "96", "--parts", "forward")
    made, tasks = smoke(bench, tmp_path / "a.json", *chosen)
    made.everything(tasks)
    found = {(r["case"], r["impl"]): r for r in made.records if r["pass"] == "forward"}
    assert found["causal", "flexattn"]["error"] == "not judged: OutOfMemoryError: no memory is left"
    assert found["noop", "flexattn"]["ms"] > 0
    assert not any(map(made.missing, tasks))


def test_a_contender_that_took_the_device_with_it_is_not_tried_again(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    out = tmp_path / "a.json"
    made, (task,) = smoke(bench, out, "--cases", "causal", "--lengths", "96", "--parts", "forward")
    made.device = "cuda"
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(bench.bench_gpu.DeviceLost, match="ValueError: odd"):
        made.failure(task.cell, "forward", "torch_flex", ValueError("odd"))
    assert [(r["impl"], r["fatal"]) for r in records_of(out)] == [("torch_flex", True)]
    again, _ = smoke(bench, out)
    assert again.missing(task) == ["forward"]
    assert again.impls(task) == [name for name in task.impls if name != "torch_flex"]
    again.everything([task])
    assert again.missing(task) == []


def test_the_fastest_variant_counts_and_one_that_fails_does_not(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(problem: Any) -> Any:
        raise RuntimeError("no such kernel")

    variants = {"one": refuses, "other": bench.gpu_contenders.ours, "none": lambda problem: None}
    monkeypatch.setitem(bench.gpu_contenders.CONTENDERS, "sdpa_cudnn", variants)
    made, tasks = smoke(bench, tmp_path / "a.json", "--cases", "noop", "--parts", "forward")
    made.everything(tasks)
    (found,) = (r for r in made.records if r["impl"] == "sdpa_cudnn")
    assert found["variant"] == "other" and found["ms"] == found["variants_ms"]["other"] and "error" not in found


@pytest.mark.parametrize("case", ["noop", "document", "alibi", "softcap"])
def test_gradients_of_some_rows_are_those_of_all_rows(bench: Any, case: str) -> None:
    problem = bench.gpu_problem.Problem(bench.gpu_suites.Cell(case, "float32", 2, 4, 2, 64, 16), "cpu")
    some = bench.gpu_judge.Judge(problem, every=63)
    assert len(some.rows) == 18 and {0, 63} <= set(some.rows.tolist())
    leaves = [t.detach().double().requires_grad_() for t in problem.leaves]
    q, k, v = leaves
    index = [i - 1 if n == 0 else i for n, i in enumerate(problem.index(range(4), torch.arange(64)))]
    scores = q @ k.repeat_interleave(2, 1).mT / 4
    score_mod, mask_mod = problem.score_mod(), problem.mask_mod()
    scores = scores if score_mod is None else score_mod(scores, *index)
    scores = scores if mask_mod is None else scores.masked_fill(~mask_mod(*index), -torch.inf)
    out = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    grads = torch.autograd.grad(out, leaves, some.dout.double())
    exact = [some.compared(t) for t in (out, *grads)]
    exact[:2] = [t[:, :, some.rows] for t in exact[:2]]
    for found, expected in zip(some.exact, exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_areas_count_elements_and_blocks(bench: Any) -> None:
    problem = bench.gpu_problem.Problem(bench.gpu_suites.Cell("causal", "float32", 1, 2, 2, 384, 16), "cpu")
    assert problem.area() == 384 * 385 // 2
    assert problem.block_area() == 6 * 128**2


def test_the_mask_tensor_of_sdpa_is_the_mods(bench: Any) -> None:
    for case in ("relative_bias", "alibi", "document"):
        problem = bench.gpu_problem.Problem(bench.gpu_suites.Cell(case, "float32", 1, 2, 2, 40, 16), "cpu")
        q, k, v = problem.leaves
        torch.testing.assert_close(
            F.scaled_dot_product_attention(q, k, v, attn_mask=problem.bias()),
            bench.gpu_contenders.ours(problem)(q, k, v),
            rtol=1e-4,
            atol=1e-5,
        )


def test_a_readme_of_somebody_else_is_not_overwritten(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My project\n")
    with pytest.raises(SystemExit, match="not made by this program"):
        bench.gpu_report.render(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My project\n"


def test_other_benchmarks_are_linked_with_their_titles(bench: Any, tmp_path: Path) -> None:
    bench.results.save(tmp_path / "masks-cpu.json", {"gpu": None}, [], "# Building masks\n\nwords\n")
    page = bench.gpu_report.render(tmp_path).read_text()
    assert "- [masks-cpu](masks-cpu.md): Building masks\n" in page and "Nothing was measured on a GPU yet" in page


def test_names_and_samples_of_a_gpu(bench: Any) -> None:
    assert bench.gpu_machine.short_name("NVIDIA H200") == "h200"
    assert bench.gpu_machine.short_name("NVIDIA A100-SXM4-80GB") == "a100-sxm4-80gb"
    sampler = bench.gpu_machine.Sampler("cpu")
    sampler.read(["1980, 700.5, 60", "[N/A], 1, 2", "", "1700, 690.5, 62", "1750, 600.5, 61"])
    assert sampler.summary()["sm_mhz"] == {"least": 1700, "median": 1750, "largest": 1980}
    assert sampler.median() == {"sm_mhz": 1750, "power_w": 690.5, "celsius": 61}
    assert sampler.median(since=sampler.samples[-1].at + 1) == {}


def test_a_filter_keeps_what_was_asked_for(bench: Any) -> None:
    suites = bench.gpu_suites
    kept = list(suites.Filter(cases=("causal",), lengths=(8192,), parts=("backward",)).keep(suites.CORE))
    assert kept and all((t.cell.case, t.cell.S, t.parts) == ("causal", 8192, ("backward",)) for t in kept)
    (calls,) = {t.parts for t in suites.Filter(parts=("host",), impls=("flexattn",)).keep(suites.CORE)}
    assert calls == ("host",)
    everything = [t for suite in suites.SUITES.values() for t in suite]
    for task in suites.Filter().keep(everything):
        assert all(suites.can_solve(impl, task.cell) for impl in task.impls)
        assert ("torch_flex_tuned" in task.impls) == (task in suites.AUTOTUNED)


def record(case: str, part: str, impl: str, ms: float | None, run: str = "1", **more: Any) -> dict[str, Any]:
    sizes = {"dtype": "bfloat16", "B": 1, "Hq": 8, "Hkv": 8, "S": 8192, "D": 128} | more
    return {"case": case, "pass": part, "impl": impl, "ms": ms, "tflops": 600.0, "max_error": 0.0, "run": run} | sizes


def verdicts(bench: Any, *records: dict[str, Any]) -> dict[str, tuple[float | None, str]]:
    measured = bench.gpu_goals.Measured(records)
    return {
        goal.name: ((v := bench.gpu_goals.verdict(goal, measured)).value, v.words) for goal in bench.gpu_goals.GOALS
    }


def test_a_goal_is_the_geometric_mean_of_ratios_within_one_run(bench: Any) -> None:
    name = "forward, noop and causal, D 128, S >= 4096: torch_flex / flexattn"
    two = [record("noop", "forward", "flexattn", 1.0), record("noop", "forward", "torch_flex", 1.0)]
    two += [record("causal", "forward", "flexattn", 1.0), record("causal", "forward", "torch_flex", 4.0)]
    assert verdicts(bench, *two)[name] == (2.0, "met")
    others = [record("noop", "forward", "flexattn", 1.0, S=2048), record("noop", "forward", "torch_flex", 99.0, S=2048)]
    others += [record("noop", "forward", "flexattn", 1.0, D=64), record("noop", "forward", "torch_flex", 1.0, D=64)]
    others += [record("noop", "forward", "flexattn", 0.01, run="2")]  # without a rival in that run
    found = verdicts(bench, *two, *others)
    assert found[name] == (2.0, "met")
    assert found["forward, noop and causal, D 64, S >= 4096: torch_flex / flexattn"] == (1.0, "not met")
    assert found["backward, noop and causal, D 128, S >= 8192: torch_flex / flexattn"] == (None, "not measured")
    assert found["every case and pass: least torch_flex / flexattn"] == (1.0, "met")
    apart = verdicts(bench, two[0], record("noop", "forward", "torch_flex", 9.0, run="2"))
    assert apart[name] == (None, "not measured")


def test_rates_overheads_and_times_have_their_own_goals(bench: Any) -> None:
    rates = [record("begin", "matmul", "matmul", 1.0) | {"tflops": t} for t in (700.0, 800.0)]
    forward = [
        record("noop", "forward", "flexattn", 2.0, area=8192**2),
        record("causal", "forward", "flexattn", 1.0, area=8192**2 // 2),
        record("alibi", "forward", "flexattn", 1.1, area=8192**2 // 2),
        record("softcap", "forward", "flexattn", 1.2, area=8192**2 // 2),
        record("document", "forward", "flexattn", 0.25, area=8192**2 // 10),
    ]
    calls = [record("causal", "first_call", "flexattn", 2900.0), record("causal", "host", "flexattn", 0.031)]
    found = verdicts(bench, *rates, *forward, *calls)
    of_matmul = found["forward, noop and causal, D 128, S >= 4096: TFLOP/s / those of the matrix product"]
    assert of_matmul == (pytest.approx(600 / 750), "met")
    assert found["forward, document: sparse efficiency, S >= 8192"] == (
        pytest.approx(2.0 * 0.1 / 0.25, rel=1e-6),
        "not met",
    )
    assert found["forward, alibi, D 128: time / that of causal"] == (pytest.approx(1.1), "met")
    assert found["forward, softcap, D 128: time / that of causal"] == (pytest.approx(1.2), "not met")
    assert found["first call, forward and backward, ms"] == (pytest.approx(2900.0), "met")
    assert found["host time of a call, ms"] == (pytest.approx(0.031), "not met")
    assert found["passes that flexattn fails"] == (0.0, "met")
    failed = record("noop", "backward", "flexattn", None) | {"error": "wrong"}
    assert verdicts(bench, failed)["passes that flexattn fails"] == (1.0, "not met")


def test_tinyllama_is_told_by_its_sizes(bench: Any) -> None:
    shape = {"Hq": 32, "Hkv": 4, "D": 64, "S": 2048}
    records = [
        record("causal", "forward_backward", impl, ms * B, B=B, **shape)
        for B in (1, 8)
        for impl, ms in (("flexattn", 1.0), ("torch_flex", 1.9))
    ]
    found = verdicts(bench, *records)
    assert found["forward and backward, TinyLlama-1.1B, S 2048, B 1: torch_flex / flexattn"] == (1.9, "not met")
    assert found["forward and backward, TinyLlama-1.1B, S 2048, B 8: torch_flex / flexattn"] == (1.9, "met")


def test_without_matplotlib_there_are_tables_and_a_line_that_says_so(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gpu_plots", None)
    bench.results.save(tmp_path / "h200.json", {"benchmark": "bench_gpu"}, [record("noop", "forward", "flexattn", 1.0)])
    page = bench.gpu_report.render(tmp_path).read_text()
    assert "Plots need matplotlib" in page and "| noop | B1H8D128 | 8192 | forward | 1.000 | 600 |" in page
