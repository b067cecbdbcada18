"""Attention on a GPU: flexattn beside its rivals, in one process, one JSON, one table.

Rivals: compiled torch flex_attention, and scaled_dot_product_attention by FlashAttention-2 and by cuDNN where they need no
mask tensor; on request also torch flex_attention tuned, SDPA with a mask tensor, and dense attention in plain torch.
Contenders take turns; `triton.testing.do_bench` times each with a cold L2 cache; the median of the rounds is reported.
Inputs are `torch.randn`, and every result is first compared with float64.

    python benchmarks/bench_gpu.py                    # everything: about an hour, most of it the rivals' compiling
    python benchmarks/bench_gpu.py --seconds 500      # what fits; the same command again goes on where it stopped
    python benchmarks/bench_gpu.py --cases causal --lengths 8192 --parts forward backward
    python benchmarks/bench_gpu.py --smoke            # tiny shapes on a CPU: does the program itself work

What was measured is merged into --out, and its table written beside it. The forward is that of training, on inputs that
need gradients. TFLOP/s count attended elements alone: 4 * B * Hq * D for each in the forward, 2.5 times that in the backward.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu_contenders import CASES, CONTENDERS, DEFAULT, Attend, Cell, Judge, Problem, can_solve, timed_pass

import flexattn

WORK = {"forward": 1.0, "backward": 2.5, "forward_backward": 3.5}  # in units of the forward's products
PARTS = (*WORK, "first_call", "host")
SHAPES = {  # B, Hq, Hkv, D
    "B4H16D64": (4, 16, 16, 64),
    "B1H32G8D128": (1, 32, 8, 128),
    "B4H16D128": (4, 16, 16, 128),
    "B1H32G8D64": (1, 32, 8, 64),
}
LENGTHS = (2048, 8192, 16384)
CALLS = 200  # for the host time of one
OVERHEAD = {  # small: nothing of it is the kernels' own time
    "first_call": Cell("causal", "bfloat16", 1, 8, 8, 1024, 64),
    "host": Cell("causal", "bfloat16", 1, 4, 4, 256, 64),
}
TINY = (1, 4, 2, 16)
PATIENCE = 900  # seconds for a process of its own

Record = dict[str, Any]


def milliseconds(function: Callable[[], object], device: str, rep: int) -> float:
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(function, warmup=max(1, rep // 4), rep=rep, return_mode="median"))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def host_milliseconds(function: Callable[[], object], device: str, calls: int) -> float:
    """Time that a call takes on the CPU: many in a row, none of which is waited for."""
    for n in (max(1, calls // 10), calls):  # the first ones warm up
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            function()
        taken = 1e3 * (time.perf_counter() - start) / n
    return taken


def first_call(name: str, cell: Cell, device: str) -> None:
    """What a process of its own does: print the milliseconds of the first forward and backward."""
    problem = Problem(cell, device)
    (problem.leaves[0] @ problem.leaves[0].mT).sum().item()  # torch's own start is not counted
    start = time.perf_counter()
    problem.gradients(problem.contender(name))[1].sum().item()
    print(1e3 * (time.perf_counter() - start))


def short(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:200]


def save(out: Path, machine: dict[str, Any], records: list[dict[str, Any]], table: str) -> None:
    """Write what was measured so far, and its table beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"machine": machine, "records": records}, indent=1) + "\n")
    os.replace(unfinished, out)  # a run that is killed leaves whole files
    out.with_suffix(".md").write_text(table)


class Bench:
    """The records so far, where they are written, and the time that is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, "cpu" if options.smoke else "cuda"
        self.run = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.deadline = time.monotonic() + options.seconds
        self.machine = machine(self.device)
        self.records: list[Record] = []
        if options.out.exists():
            content = json.loads(options.out.read_text())
            self.records, self.machine = content["records"], content["machine"] | self.machine

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def contenders(self, cell: Cell) -> list[str]:
        return [name for name in self.options.contenders if can_solve(name, cell.case)]

    def missing(self, cell: Cell, part: str) -> bool:
        """Whether something is left to measure. Contenders are only compared within one run, so it is all or nothing."""
        known = {r["impl"] for r in self.records if r["pass"] == part and cell_of(r) == cell}
        return self.options.again or not known >= set(self.contenders(cell))

    def add(self, cell: Cell, part: str, impl: str, **values: Any) -> None:
        """A new record, in the place of an older one of the same measurement."""
        record = {**cell._asdict(), "pass": part, "impl": impl, "ms": None, "tflops": None, "max_error": None, **values}
        if part in PARTS:
            same = lambda r: cell_of(r) == cell and r["pass"] == part and r["impl"] == impl
            self.records = [r for r in self.records if not same(r)]
        self.records.append({**record, "run": self.run})

    def write(self) -> None:
        save(self.options.out, self.machine, self.records, table(self.machine, self.records))

    def limits(self, when: str) -> None:
        """A matrix product and a copy: what this GPU can do now, at its present clocks. S is the size of each."""
        n, size = (64, 1 << 16) if self.options.smoke else (8192, 1 << 30)
        a, b = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        ms = milliseconds(lambda: a @ b, self.device, self.options.rep)
        self.add(Cell(when, "bfloat16", 1, 1, 1, n, n), "matmul", "matmul", ms=ms, tflops=2e-9 * n**3 / ms)
        source = torch.randn(size // 4, device=self.device)
        target = torch.empty_like(source)
        ms = milliseconds(lambda: target.copy_(source), self.device, self.options.rep)
        self.add(Cell(when, "float32", 1, 1, 1, size, 1), "copy", "copy", ms=ms, gb_per_s=2e-6 * size / ms)
        self.write()

    def measure(self, cell: Cell) -> None:
        """The passes of one cell: every contender is checked, then all are timed in turns."""
        parts = [p for p in self.options.parts if p in WORK and self.missing(cell, p)]
        if not parts or self.late():
            return
        print(f"{cell.case} {cell.shape}: {', '.join(parts)}", file=sys.stderr, flush=True)
        torch._dynamo.reset()
        problem = Problem(cell, self.device)
        judge, work = Judge(problem), 4 * cell.B * cell.Hq * cell.D * problem.area()
        ready: dict[str, tuple[Attend, dict[str, float]]] = {}
        broken: dict[str, str] = {}
        for name in self.contenders(cell):
            try:
                attend = problem.contender(name)
                ready[name] = attend, judge.errors(attend)
            except Exception as error:  # a contender that fails is a result too
                broken[name] = short(error)
        for part in parts:
            if self.late():
                break
            times: dict[str, list[float]] = {name: [] for name in ready}
            failed = dict(broken)
            for _, name in product(range(self.options.rounds), ready):  # interleaved: A B C A B C
                if name in failed:
                    continue
                try:
                    function = timed_pass(problem, ready[name][0], part)
                    times[name].append(milliseconds(function, self.device, self.options.rep))
                except Exception as error:
                    failed[name] = short(error)
            for name in self.contenders(cell):
                if name in failed:
                    self.add(cell, part, name, error=failed[name])
                    continue
                ms, worst = statistics.median(times[name]), ready[name][1][part]
                tflops = 1e-9 * WORK[part] * work / ms
                self.add(cell, part, name, ms=ms, tflops=tflops, max_error=worst, rounds_ms=times[name])
            self.write()

    def host(self, cell: Cell) -> None:
        """The CPU's share of a call; `forward_backward_ms` is that of both passes."""
        torch._dynamo.reset()
        problem, calls = Problem(cell, self.device), 5 if self.options.smoke else CALLS
        for name in self.contenders(cell):
            try:
                attend = problem.contender(name)
                functions = [timed_pass(problem, attend, part) for part in ("forward", "forward_backward")]
                forward, both = (host_milliseconds(f, self.device, calls) for f in functions)
                self.add(cell, "host", name, ms=forward, forward_backward_ms=both)
            except Exception as error:
                self.add(cell, "host", name, error=short(error))

    def first_call(self, cell: Cell) -> None:
        """The first forward and backward of a fresh process, with empty caches of compiled code."""
        for name in self.contenders(cell):
            if self.late():
                return
            with tempfile.TemporaryDirectory() as empty:
                caches = {n: str(Path(empty) / n) for n in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
                command = [sys.executable, __file__, "--first-call", name, self.device, *map(str, cell)]
                try:
                    done = subprocess.run(
                        command, env={**os.environ, **caches}, capture_output=True, text=True, timeout=PATIENCE
                    )
                except subprocess.TimeoutExpired as error:
                    self.add(cell, "first_call", name, error=short(error))
                    continue
            if done.returncode:
                said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
                self.add(cell, "first_call", name, error=said[-1][:200])
            else:
                self.add(cell, "first_call", name, ms=float(done.stdout.split()[-1]))

    def everything(self) -> None:
        o = self.options
        self.limits("begin")
        for part, function in (("first_call", self.first_call), ("host", self.host)):
            if part in o.parts and not self.late() and self.missing(OVERHEAD[part], part):
                function(OVERHEAD[part])
                self.write()
        for S, shape, case in product(o.lengths, o.shapes, o.cases):
            B, Hq, Hkv, D = SHAPES.get(shape, TINY)
            self.measure(Cell(case, o.dtype, B, Hq, Hkv, S, D))
            if self.device == "cuda":
                torch.cuda.empty_cache()
        self.limits("end")


def cell_of(record: Record) -> Cell:
    return Cell(*(record[name] for name in Cell._fields))


def machine(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.__version__, "flexattn": flexattn.__version__}
    found |= {"python": platform.python_version()}
    if device == "cpu":
        return {"gpu": None, "cpu": platform.processor() or platform.machine(), **found}
    import triton

    found |= {"triton": triton.__version__, "cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda}
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        driver, *clocks = said.strip().split(", ")
        found |= {"driver": driver, "clocks": dict(zip(query.split(",")[1:], clocks, strict=True))}
    except (OSError, ValueError, subprocess.SubprocessError):
        found |= {"driver": None, "clocks": None}
    return {"gpu": torch.cuda.get_device_name(), **found}


def table(about: dict[str, Any], records: list[Record]) -> str:
    """Markdown: our times, and the rivals' divided by ours; above 1, flexattn is faster."""
    cells: dict[tuple[Cell, str], dict[str, Record]] = {}
    for r in records:
        cells.setdefault((cell_of(r), r["pass"]), {})[r["impl"]] = r
    compared = {at: found for at, found in cells.items() if at[1] in PARTS and "flexattn" in found}
    rivals = [n for n in CONTENDERS if n != "flexattn" and any(n in found for found in compared.values())]
    lines = [
        f"# Attention on {about['gpu'] or 'a CPU'}",
        "",
        ", ".join(f"{k} {v}" for k, v in about.items() if v is not None and k != "clocks"),
        "",
        "Times of the rivals divided by that of flexattn: above 1, flexattn is faster.",
        "",
        "| case | shape | pass | ms | TFLOP/s | " + "".join(f"{n} | " for n in rivals) + "max error |",
        "|---" * (6 + len(rivals)) + "|",
    ]
    ratios: dict[tuple[str, str], list[float]] = {}
    for (cell, part), found in compared.items():
        ours = found["flexattn"]
        row = [cell.case, cell.shape, part, number(ours["ms"], ".3f"), number(ours["tflops"], ".0f")]
        for name in rivals:
            theirs = found.get(name, {})
            if theirs.get("ms") and ours["ms"] and theirs["run"] == ours["run"]:
                ratio = theirs["ms"] / ours["ms"]
                ratios.setdefault((part, name), []).append(ratio)
                row.append(f"{ratio:.2f}")
            else:
                row.append("failed" if "error" in theirs else "")
        lines.append("| " + " | ".join([*row, number(ours["max_error"], ".1e")]) + " |")
    lines.append("")
    for (part, name), values in ratios.items():
        mean = math.exp(statistics.fmean(map(math.log, values)))
        spread = f"least {min(values):.2f}, largest {max(values):.2f}, {len(values)} cells"
        lines.append(f"- {part}, {name} / flexattn: geometric mean {mean:.2f}, {spread}")
    for r in (r for r in records if r["impl"] in ("matmul", "copy")):
        rate = f"{r['tflops']:.0f} TFLOP/s" if r["impl"] == "matmul" else f"{r['gb_per_s']:.0f} GB/s"
        lines.append(f"- {r['impl']} at the {r['case']} of the run of {r['run']}: {rate}")
    for r in (r for r in records if "error" in r):
        lines.append(f"- {r['impl']} failed on {r['case']}, {cell_of(r).shape}, {r['pass']}: {r['error']}")
    return "\n".join(lines) + "\n"


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main() -> None:
    if sys.argv[1:2] == ["--first-call"]:
        name, device, case, dtype, *sizes = sys.argv[2:]
        return first_call(name, Cell(case, dtype, *map(int, sizes)), device)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU, against dense attention")
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=2, help="how often the contenders take turns")
    parser.add_argument("--rep", type=int, default=100, help="milliseconds of repetitions of each measurement")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after that long")
    parser.add_argument("--again", action="store_true", help="measure also what --out has already, failures included")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>-<date>.json")
    options = parser.parse_args()
    if options.smoke:
        options.shapes, options.lengths = ["tiny"], (200,)
        options.contenders = options.contenders or ("flexattn", "dense")
        options.out = options.out or Path(tempfile.mkdtemp()) / "smoke.json"
    elif not torch.cuda.is_available():
        raise SystemExit("This needs a CUDA device. --smoke tries the program on a CPU; bench_cpu.py measures there.")
    elif options.out is None:
        gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().replace("nvidia", "")).strip("-")
        options.out = Path(__file__).parent / "results" / f"{gpu}-{datetime.now(timezone.utc):%Y-%m-%d}.json"
    options.contenders = options.contenders or DEFAULT
    bench = Bench(options)
    bench.everything()
    print(table(bench.machine, bench.records))
    print(f"written to {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
