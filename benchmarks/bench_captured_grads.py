"""Learned biases: attention whose score_mod reads tensors that get gradients, beside its rivals, causal.

On a CUDA GPU the rival is compiled torch flex_attention; on a CPU, where that has no backward, dense attention in plain
torch and scaled_dot_product_attention with a bias tensor. Contenders take turns, the median of the rounds is reported, and
every output and gradient is first compared with float64. The time of flexattn without a score_mod is the floor.

    python benchmarks/bench_captured_grads.py                  # all cases
    python benchmarks/bench_captured_grads.py --seconds 500    # what fits; the same command again goes on
    python benchmarks/bench_captured_grads.py --cases slopes t5 --lengths 2048
    python benchmarks/bench_captured_grads.py --quick          # tiny shapes on a CPU, one round

What was measured is merged into --out, and its table written beside it. Learned tensors are float32.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bench_cpu import peak, reset_peak
from captured_contenders import ABOUT, CASES, CONTENDERS, ON_CPU, ON_GPU, Cell, Entry, Judge, Problem, can_solve
from gpu_machine import machine
from results import save
from timing import milliseconds, short, timed_pass

PASSES = ("forward", "backward", "forward_backward")
SIZES = {"cuda": (1, 16, (64, 128), (2048, 8192), "bfloat16"), "cpu": (1, 8, (64,), (1024, 2048), "float32")}
TINY = (1, 2, (16,), (96,), "float32")

Record = dict[str, Any]


class Bench:
    """The records so far, where they are written, and the time that is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        self.run = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.deadline = time.monotonic() + options.seconds
        self.machine = machine(self.device) | ({} if self.device == "cuda" else {"threads": torch.get_num_threads()})
        self.records: list[Record] = []
        if options.out.exists():
            content = json.loads(options.out.read_text())
            self.records, self.machine = content["records"], content["machine"] | self.machine

    def contenders(self, cell: Cell) -> list[str]:
        return [name for name in self.options.contenders if can_solve(name, cell.case)]

    def missing(self, cell: Cell) -> bool:
        """Whether something is left to measure. Contenders are only compared within one run, so it is all or nothing."""
        known = {(r["impl"], r["pass"]) for r in self.records if cell_of(r) == cell}
        return self.options.again or not known >= set(product(self.contenders(cell), PASSES))

    def measure(self, cell: Cell) -> None:
        """Every contender is checked, then all are timed in turns."""
        if not self.missing(cell) or time.monotonic() > self.deadline:
            return
        print(f"{cell.case} {cell.shape} {cell.dtype}", file=sys.stderr, flush=True)
        torch._dynamo.reset()
        problem = Problem(cell, self.device)
        judge = Judge(problem)
        ready: dict[str, tuple[Entry, dict[str, float | None]]] = {}
        failed: dict[str, str] = {}
        for name in self.contenders(cell):
            try:
                entry = problem.entry(name)
                ready[name] = entry, dict.fromkeys(PASSES) if name == "floor" else judge.errors(entry)
            except Exception as error:  # a contender that fails is a result too
                failed[name] = short(error)
        del judge
        times: dict[tuple[str, str], list[float]] = {}
        memory: dict[str, float | None] = {name: self.memory(cell, entry, name) for name, (entry, _) in ready.items()}
        for which, turn in product(PASSES, range(self.options.rounds + 1)):  # interleaved: A B C A B C
            for name, (entry, _) in ready.items():
                if name in failed:
                    continue
                try:
                    ms = self.milliseconds(entry, which)
                except Exception as error:
                    failed[name] = short(error)
                    continue
                if turn:  # the first one warms up
                    times.setdefault((name, which), []).append(ms)
        self.records = [r for r in self.records if cell_of(r) != cell]
        for name, which in product(self.contenders(cell), PASSES):
            record: Record = {**cell._asdict(), "pass": which, "impl": name, "run": self.run}
            if name in failed:
                record |= {"ms": None, "error": failed[name]}
            else:
                rounds = times[name, which]
                record |= {"ms": statistics.median(rounds), "rounds_ms": rounds, "max_error": ready[name][1][which]}
                record |= {"extra_mib": memory[name]} if which == "forward_backward" else {}
            self.records.append(record)
        self.write()

    def milliseconds(self, entry: Entry, which: str) -> float:
        function = timed_pass(entry, entry.attend, which)  # type: ignore[arg-type]
        if self.device == "cuda":
            return milliseconds(function, "cuda", self.options.rep)
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)

    def memory(self, cell: Cell, entry: Entry, name: str) -> float | None:
        """MiB that a forward and backward add to the peak."""
        if self.options.quick:
            return None
        if self.device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            entry.gradients(entry.attend)
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        command = [sys.executable, __file__, "--memory", str(torch.get_num_threads()), name, *map(str, cell)]
        done = subprocess.run(command, capture_output=True, text=True)
        return float(done.stdout.split()[-1]) if done.returncode == 0 else None

    def write(self) -> None:
        save(self.options.out, self.machine, self.records, table(self.machine, self.records))


def print_memory(name: str, cell: Cell) -> None:
    """What a process of its own does: print the MiB that a forward and backward add to its peak."""
    small = Problem(cell._replace(S=64), "cpu").entry(name)
    small.gradients(small.attend)  # torch's own start is not counted
    entry = Problem(cell, "cpu").entry(name)
    before = reset_peak()
    entry.gradients(entry.attend)
    print((peak() - before) / 1024)


def cell_of(record: Record) -> Cell:
    return Cell(*(record[name] for name in Cell._fields))


def table(about: dict[str, Any], records: list[Record]) -> str:
    """Markdown: our times, and the others' divided by ours; above 1, flexattn is faster."""
    cells: dict[tuple[Cell, str], dict[str, Record]] = {}
    for r in records:
        cells.setdefault((cell_of(r), r["pass"]), {})[r["impl"]] = r
    others = [n for n in CONTENDERS if n != "flexattn" and any(n in found for found in cells.values())]
    lines = [
        f"# Gradients of captured tensors on {about['gpu'] or 'a CPU'}",
        "",
        ", ".join(f"{k} {v}" for k, v in about.items() if v is not None and k != "clocks"),
        "",
        "Causal. Times of the others divided by that of flexattn: above 1, flexattn is faster. MiB: what a forward and "
        "backward add to the peak of memory.",
        "",
        "| case | shape | dtype | pass | ms | " + "".join(f"{n} | " for n in others) + "max error | MiB |",
        "|---" * (7 + len(others)) + "|",
    ]
    for (cell, which), found in cells.items():
        ours = found.get("flexattn", {})
        row = [cell.case, cell.shape, cell.dtype, which, said(ours.get("ms"), ".2f")]
        row += [ratio(found, name) for name in others]
        row += [said(ours.get("max_error"), ".1e"), said(ours.get("extra_mib"), ".0f")]
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", *verdicts(cells), ""]
    lines += [f"- {name}: {ABOUT[name]}" for name in ("flexattn", *others)]
    for (cell, which), found in cells.items():
        if which == "forward_backward":
            used = {n: r["extra_mib"] for n, r in found.items() if r.get("extra_mib") is not None}
            if used:
                lines.append(f"- MiB, {cell.case} {cell.shape}: " + ", ".join(f"{n} {m:.0f}" for n, m in used.items()))
    for r in records:
        if "error" in r and r["pass"] == PASSES[0]:
            lines.append(f"- {r['impl']} failed on {r['case']}, {cell_of(r).shape}: {r['error']}")
    return "\n".join(lines) + "\n"


def verdicts(cells: dict[tuple[Cell, str], dict[str, Record]]) -> list[str]:
    """A line a cell: the backward of torch flex_attention beside ours, and the goal."""
    lines = []
    for (cell, which), found in cells.items():
        if which == "backward" and "torch_flex" in found:
            value, goal = ratio(found, "torch_flex"), CASES[cell.case].goal
            met = "" if value in ("", "failed") else ", met" if float(value) >= goal else ", missed"
            lines.append(
                f"- {cell.case} {cell.shape}: backward torch_flex / flexattn {value or 'none'}, goal {goal:g}{met}"
            )
    return lines


def ratio(found: dict[str, Record], name: str) -> str:
    ours, theirs = found.get("flexattn", {}), found.get(name, {})
    if ours.get("ms") and theirs.get("ms") and ours["run"] == theirs["run"]:
        return f"{theirs['ms'] / ours['ms']:.2f}"
    return "failed" if "error" in theirs else ""


def said(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main() -> None:
    if sys.argv[1:2] == ["--memory"]:
        threads, name, case, dtype, *sizes = sys.argv[2:]
        torch.set_num_threads(int(threads))
        return print_memory(name, Cell(case, dtype, *map(int, sizes)))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes on a CPU, one round")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--head-dims", nargs="+", type=int)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, help=f"default: {' '.join(ON_GPU)} or {' '.join(ON_CPU)}"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="how often the contenders take turns")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of a CPU")
    parser.add_argument("--rep", type=int, default=100, help="milliseconds of repetitions of each measurement on a GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after that long")
    parser.add_argument("--again", action="store_true", help="measure also what --out has already, failures included")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/captured-grads-<device>-<date>.json")
    options = parser.parse_args()
    if options.quick:
        options.device, options.rounds = "cpu", 1
        options.out = options.out or Path(tempfile.mkdtemp()) / "quick.json"
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    if options.out is None:
        gpu = torch.cuda.get_device_name().lower().replace("nvidia", "") if options.device == "cuda" else "cpu"
        name = re.sub(r"[^a-z0-9]+", "-", gpu).strip("-")
        options.out = (
            Path(__file__).parent / "results" / f"captured-grads-{name}-{datetime.now(timezone.utc):%Y-%m-%d}.json"
        )
    options.contenders = options.contenders or (ON_GPU if options.device == "cuda" else ON_CPU)
    B, H, head_dims, lengths, dtype = TINY if options.quick else SIZES[options.device]
    bench = Bench(options)
    for S, D, case in product(options.lengths or lengths, options.head_dims or head_dims, options.cases):
        bench.measure(Cell(case, options.dtype or dtype, B, H, S, D))
        if options.device == "cuda":
            torch.cuda.empty_cache()
    print(table(bench.machine, bench.records))
    print(f"written to {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
