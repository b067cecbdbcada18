"""The examples run, on a few steps, and so do benchmarks, on tiny shapes without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def test_train_packed_learns_checks_itself_and_draws(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "train_packed.py"), "--smoke", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert "loss" in run.stdout


def test_the_benchmark_of_captured_gradients_checks_measures_and_writes_its_table(tmp_path: Path) -> None:
    out = tmp_path / "captured.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_captured_grads.py"), "--quick", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for cases in (["slopes"], ["slopes", "t5", "relative", "gates", "pair", "groups"]):  # the second run goes on
        run = subprocess.run(
            [*command, "--cases", *cases], capture_output=True, text=True, env=environment, timeout=240
        )
        assert run.returncode == 0, run.stderr[-2000:]
    assert "slopes B1" not in run.stderr
    records = json.loads(out.read_text())["records"]
    assert not [r for r in records if "error" in r]
    impls = {"slopes": 4, "t5": 5, "relative": 5, "gates": 4, "pair": 4, "groups": 5}
    assert {case: sum(r["case"] == case for r in records) for case in impls} == {c: 3 * n for c, n in impls.items()}
    assert all(r["ms"] > 0 for r in records)
    assert all(r["max_error"] < 1e-3 for r in records if r["impl"] != "floor")
    assert "| gates |" in out.with_suffix(".md").read_text()


def test_the_block_mask_benchmark_measures_both_libraries_and_writes_its_table(tmp_path: Path) -> None:
    out = tmp_path / "masks"
    run = subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks" / "bench_block_mask.py"),
            "--smoke",
            "--device",
            "cpu",
            "--out",
            str(out),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    records = json.loads(out.with_suffix(".json").read_text())["records"]
    assert {(r["case"], r["implementation"]) for r in records} == {
        (case, name) for case in ("natten_2d", "documents_renamed") for name in ("flexattn", "torch")
    }
    assert all(r["cold"] > 0 and r["warm"] > 0 for r in records)
    assert "| natten_2d | 1,024 |" in out.with_suffix(".md").read_text()


def test_the_benchmark_of_host_time_measures_and_writes_its_table(tmp_path: Path) -> None:
    out = tmp_path / "overhead"
    run = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "bench_overhead.py"), "--smoke", "--out", str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(out.with_suffix(".json").read_text())
    assert {(r["case"], r["implementation"]) for r in found["records"]} == {
        (case, name) for case in ("none", "method") for name in ("flexattn", "sdpa")
    }
    assert all(us > 0 for parts in found["parts_us"].values() for us in parts.values())
    assert "| method | forward and backward |" in out.with_suffix(".md").read_text()


def block_mask_benchmark() -> Any:
    spec = spec_from_file_location("bench_block_mask", ROOT / "benchmarks" / "bench_block_mask.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


BENCHMARK = block_mask_benchmark()


@pytest.mark.parametrize("case", [*BENCHMARK.COMMON, *BENCHMARK.OTHERS, "window_and_documents"])
def test_the_masks_of_the_benchmark_have_the_blocks_of_torchs(case: str) -> None:
    BENCHMARK.check(case, 2048, "cpu")


def test_the_benchmark_of_batch_invariance_prints_its_table() -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "bench_batch_invariance.py"), "--smoke"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count(" times |") == 4, run.stdout
