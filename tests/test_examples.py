"""The examples run, on a few steps, and so does the GPU benchmark, on tiny shapes without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_the_gpu_benchmark_measures_records_and_writes_its_table(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_gpu.py"), "--smoke", "--cases", "causal", "alibi"]
    run = subprocess.run(
        [*command, "--parts", "forward", "backward", "--out", str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    records = [r for r in json.loads(out.read_text())["records"] if r["case"] in ("causal", "alibi")]
    assert {(r["case"], r["pass"]) for r in records if r["impl"] == "flexattn"} == {
        (case, part) for case in ("causal", "alibi") for part in ("forward", "backward")
    }
    assert all(r["ms"] > 0 and r["max_error"] < 0.1 for r in records if r["impl"] == "flexattn")
    assert "| causal |" in out.with_suffix(".md").read_text()
