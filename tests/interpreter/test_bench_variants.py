"""The benchmark of our own kernels' ways, in the interpreter at tiny shapes: what it times, refuses and resumes."""

from __future__ import annotations

import importlib
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
import torch._functorch.config

ROOT = Path(__file__).parents[2]
NAMES = ("gpu_suites", "gpu_variants", "variant_steps", "variants_report", "bench_variants")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The modules of the benchmark, by name."""
    sys.path.append(str(ROOT / "benchmarks"))
    donated = torch._functorch.config.donated_buffer
    try:
        yield Namespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        torch._functorch.config.donated_buffer = donated
        sys.path.remove(str(ROOT / "benchmarks"))
        for name, module in list(sys.modules.items()):
            if isinstance(module, ModuleType) and str(ROOT / "benchmarks") in str(getattr(module, "__file__", "")):
                del sys.modules[name]


def measured(bench: Any, out: Path, *arguments: str) -> list[dict[str, Any]]:
    """The records of a smoke run."""
    program = bench.bench_variants
    options = program.parser().parse_args(["--smoke", "--rounds", "1", "--out", str(out), *arguments])
    program.Bench(options).everything(program.chosen(options))
    return list(json.loads(out.read_text())["records"])


@pytest.mark.parametrize("part", ["forward", "dq", "dkdv", "backward"])
def test_every_way_of_a_pass_is_right_and_timed(bench: Any, tmp_path: Path, part: str) -> None:
    records = measured(bench, tmp_path / "a.json", "--cells", "causal", "--passes", part)
    (cell,) = {r["cell"] for r in records}
    assert cell == "causal-B1H2/1D16-S40"
    ways = bench.gpu_variants.variants(part, bench.gpu_variants.SMOKE[0])
    assert [r["variant"] for r in records] == [way.name for way in ways] and ways[0].name == "default"
    assert [r for r in records if "error" in r or not r["ms"] > 0 or not r["ratio"] > 0] == []
    text = (tmp_path / "a.md").read_text()
    assert all(f"| {way.name} |" in text for way in ways), "each is in the summary over all problems"
    assert f"## {cell}, {part}\n" in text


def test_other_cases_have_ways_too(bench: Any, tmp_path: Path) -> None:
    records = measured(bench, tmp_path / "a.json", "--cells", "noop", "document", "--variants", "one head at a time")
    found = {(r["case"], r["pass"], r["variant"]) for r in records if r["ms"] > 0}
    assert {("noop", "forward", "one head at a time"), ("document", "backward", "one head at a time")} <= found
    assert {(case, part, "default") for case in ("noop", "document") for part in ("dq", "dkdv")} <= found
    assert not any(r["case"] == "noop" and "as they come" in r["variant"] for r in records)


def test_a_way_that_computes_something_else_is_never_timed(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps_of = bench.variant_steps.Ways.steps

    def spoilt(self: Any, part: str, way: Any) -> Any:
        steps = steps_of(self, part, way)
        if way.name == "128x64 w4 s2 tma":
            steps.timed.append(lambda: steps.outputs()[0][:, :, -1].add_(1.0))
        return steps

    monkeypatch.setattr(bench.variant_steps.Ways, "steps", spoilt)
    chosen = ("--cells", "noop", "--passes", "forward", "--variants", "128x64 w4 s2")
    records = {r["variant"]: r for r in measured(bench, tmp_path / "a.json", *chosen)}
    wrong = records.pop("128x64 w4 s2 tma")
    assert wrong["error"].startswith("ValueError: wrong: ") and "ms" not in wrong
    assert set(records) == {"default", "128x64 w4 s2 pointers", "128x64 w4 s2 tma overlap"}
    assert all(r["ms"] > 0 for r in records.values())
    assert "| 128x64 w4 s2 tma | failed | | | ValueError: wrong: " in (tmp_path / "a.md").read_text()


def test_a_way_that_fails_is_one_line_and_the_run_goes_on(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench.gpu_variants.Variant
    impossible = made("impossible", {"ONE_PASS": True, "DETERMINISTIC": True})
    ways = [made("default", {}), impossible, made("two passes", {"ONE_PASS": False})]
    monkeypatch.setitem(bench.gpu_variants._OF_PASS, "backward", lambda cell: ways)
    records = measured(bench, tmp_path / "a.json", "--cells", "noop", "--passes", "backward")
    assert {r["variant"]: "error" in r for r in records} == {"impossible": True, "default": False, "two passes": False}
    (failed,) = (r for r in records if r["variant"] == "impossible")
    assert (
        "in an order that differs from run to run, which DETERMINISTIC" in failed["error"] and failed["fatal"] is False
    )


def test_a_problem_whose_default_is_wrong_is_not_timed(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = bench.bench_variants.ours

    def wrong(problem: Any) -> Any:
        added = 0.5 if problem.cell.case == "noop" else 0.0
        return lambda q, k, v: ours(problem)(q, k, v) + added

    monkeypatch.setattr(bench.bench_variants, "ours", wrong)
    chosen = ("--cells", "noop", "document", "--passes", "forward", "--variants", "default")
    records = measured(bench, tmp_path / "a.json", *chosen)
    found = [(r["case"], r["variant"], "error" in r) for r in records]
    assert found == [("noop", "float64", True), ("document", "default", False)]
    assert measured(bench, tmp_path / "a.json", *chosen, "--resume") == records, "nothing is left"


def test_a_run_goes_on_where_it_lost_the_device(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, out = bench.bench_variants, tmp_path / "a.json"
    checked, alive = program.checked, [True]

    def lost(steps: Any, way: Any, expected: Any) -> Any:
        if way.name == "128x64 w4 s2 tma":
            raise ValueError("odd")
        if way.name == "one head at a time" and alive[0]:
            alive[0] = False
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return checked(steps, way, expected)

    def clean(self: Any) -> None:
        if not alive[0]:
            raise RuntimeError("the device is lost")

    monkeypatch.setattr(program, "checked", lost)
    monkeypatch.setattr(program.Bench, "clean", clean)
    chosen = ("--cells", "noop", "--passes", "forward", "dq", "--variants", "one head", "128x64 w4 s2 tma")
    with pytest.raises(program.DeviceLost, match="illegal memory access"):
        measured(bench, out, *chosen)
    alive[0] = True
    records = measured(bench, out, *chosen, "--resume")
    fatal = [r["variant"] for r in records if r.get("fatal")]
    timed = [(r["pass"], r["variant"]) for r in records if r.get("ms")]
    assert fatal == ["one head at a time"]
    assert timed == [("forward", "default"), ("forward", "128x64 w4 s2 tma overlap"), ("dq", "default")]
    assert [r["variant"] for r in records if r.get("error") == "ValueError: odd"] == ["128x64 w4 s2 tma"], "once"
    assert measured(bench, out, *chosen, "--resume") == records, "nothing is left"


def test_switches_reach_the_kernels(bench: Any) -> None:
    steps, cell = bench.variant_steps, bench.gpu_variants.SMOKE[0]
    ways = steps.Ways(importlib.import_module("gpu_problem").Problem(cell, "cpu"))
    by_name = {way.name: way for part in ("forward", "backward") for way in bench.gpu_variants.variants(part, cell)}
    config = importlib.import_module("flexattn.config").KernelConfig(32, 32, 4, 1)

    def forward(name: str) -> tuple[bool, int]:
        way = by_name[name]
        (call,) = ways.steps("forward", way).calls
        with steps.switched(way.switches):
            return call.shaped(config)["order"] is None, call.arguments["heads_at_once"]

    assert forward("default") == (False, 2)
    assert forward("tiles as they come") == (True, 2)
    assert forward("one head at a time") == (False, 1)
    splits = lambda name: ways.steps("dkdv", by_name[name]).calls[0].arguments["splits"]
    assert (splits("two passes"), splits("two passes, groups whole")) == (2, 1)


def test_kernels_are_compiled_for_a_target_without_a_device() -> None:
    chosen = ["--cells", "noop-B1H16D256", "--passes", "dq", "--variants", "64x32 w4 s2 tma"]
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_variants.py"), "--target", "sm_90", *chosen]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "TRITON_INTERPRET": "0"}
    )
    assert run.returncode == 0, run.stderr[-2000:]
    default, tma = run.stdout.strip().splitlines()
    assert default.startswith("noop-B1H16D256-S2048 dq | default |  |  |  | ") and "[dq " in default
    assert tma.endswith("[dq 64x32 w4 s2 tma] |") and "failed" not in tma
