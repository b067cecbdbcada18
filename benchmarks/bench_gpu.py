"""Attention on a GPU: flexattn beside its rivals, in one process.

Rivals: compiled torch flex_attention, and scaled_dot_product_attention by FlashAttention-2, by cuDNN, and with a mask tensor
for what SDPA cannot do otherwise; for a few problems also torch flex_attention tuned, which takes minutes to compile.
Every result is first compared with float64. Then the contenders take turns, A B C A B C: `triton.testing.do_bench` times
each with a cold L2 cache for --rep milliseconds, and the median of the rounds is the result. Inputs are `torch.randn`.

    python benchmarks/bench_gpu.py                      # what fits into --seconds; again: goes on where it stopped
    python benchmarks/bench_gpu.py --suite core         # what the goals are about; see gpu_suites.py
    python benchmarks/bench_gpu.py --cases causal --lengths 8192 --parts forward backward --impls flexattn sdpa_cudnn
    python benchmarks/bench_gpu.py --render             # tables and plots again, nothing is measured
    python benchmarks/bench_gpu.py --smoke              # tiny shapes on a CPU: does the program itself work

Results are merged into --out, and README.md beside it is made of all files of that folder. The forward is that of
training, on inputs that need gradients. TFLOP/s count attended elements alone: 4 * B * Hq * D for each in the forward,
2.5 times that in the backward. A problem is measured again from its start when a run ends within it.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_contenders import CONTENDERS
from gpu_judge import EVERY_ROW, Judge
from gpu_machine import Sampler, machine, short_name
from gpu_problem import Attend, Problem
from gpu_report import render
from gpu_suites import ALL_IMPLS, CASES, PARTS, SHAPES, SMOKE, SUITES, WORK, Cell, Filter, Task
from results import load, save
from timing import host_milliseconds, in_a_fresh_process, milliseconds, short, timed_pass

RESULTS = Path(__file__).parent / "results"
CALLS = 200  # for the host time of one
PATIENCE = 600.0  # seconds for a process of its own
COMPILES = {"torch_flex": 20.0, "torch_flex_tuned": 150.0}  # seconds that must be left for one to be begun
MARGIN = 8.0  # seconds before the deadline at which nothing more is timed: the last rates and the files take a few


class OutOfTime(Exception):
    """The deadline has passed; what is unfinished is dropped."""


class DeviceLost(Exception):
    """The GPU takes no more work from this process."""


class Way(NamedTuple):
    """A contender and one of its variants."""

    name: str
    variant: str


class Ready(NamedTuple):
    """What can be timed: its results are right, and so far from float64, by pass."""

    attend: Attend
    errors: dict[str, float]


class Bench:
    """The records so far, where they are written, and the time that is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, "cpu" if options.smoke else "cuda"
        self.run = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self.deadline = time.monotonic() + options.seconds - (0 if options.smoke else MARGIN)
        before = load(options.out)
        self.records = before.records
        about = {"benchmark": "bench_gpu", "rep_ms": options.rep, "rounds": options.rounds}
        self.machine = before.machine | machine(self.device) | about
        self.sampler = Sampler(self.device)

    def check_time(self, *names: str) -> None:
        """Raise if there is no time left, or too little for one of these contenders to compile."""
        needed = 0.0 if self.options.smoke else max((COMPILES.get(name, 0.0) for name in names), default=0.0)
        if time.monotonic() + needed > self.deadline:
            raise OutOfTime

    def impls(self, task: Task) -> list[str]:
        """The contenders, without those that took the device with them in an earlier run."""
        fatal = {r["impl"] for r in self.records if r.get("fatal") and Cell.of(r) == task.cell}
        return [name for name in task.impls if name not in fatal]

    def missing(self, task: Task) -> list[str]:
        """The passes left to measure. Contenders are only compared within one run, so it is all or nothing."""
        known: dict[tuple[str, str], set[str]] = {}
        for r in self.records:
            if Cell.of(r) == task.cell and (r["run"] == self.run or not self.options.again):
                known.setdefault((r["pass"], r["run"]), set()).add(r["impl"])
        wanted = set(self.impls(task))
        if not wanted:
            return []
        return [p for p in task.parts if not any(part == p and wanted <= have for (part, _), have in known.items())]

    def add(self, cell: Cell, part: str, impl: str, **values: Any) -> None:
        """A new record, in the place of one of the same measurement in this run."""
        record = {**cell._asdict(), "pass": part, "impl": impl, "ms": None, "tflops": None, "max_error": None, **values}
        same = lambda r: Cell.of(r) == cell and (r["pass"], r["impl"], r["run"]) == (part, impl, self.run)
        self.records = [r for r in self.records if not same(r)] + [{**record, "run": self.run}]

    def write(self) -> None:
        samples = {**self.machine.get("sampled", {}), self.run: self.sampler.summary()}
        save(self.options.out, {**self.machine, "sampled": samples}, self.records)

    def failure(self, cell: Cell, part: str, impl: str, error: Exception) -> str:
        """The words for an error. Raises DeviceLost, once it is recorded, if the device is gone too."""
        words = short(error)
        error.__traceback__ = None  # it holds tensors
        if self.device == "cuda":
            try:
                torch.cuda.synchronize()
                gc.collect()
                torch.cuda.empty_cache()
            except Exception:
                self.add(cell, part, impl, error=words, fatal=True)
                self.write()
                raise DeviceLost(words) from None
        return words

    def limits(self, when: str) -> None:
        """A matrix product and a copy: what this GPU can do now, at its present clocks. S is the size of each."""
        n, size = (64, 1 << 16) if self.options.smoke else (8192, 1 << 30)
        since = time.monotonic()
        a, b = (torch.randn(n, n, device=self.device).bfloat16() for _ in range(2))
        ms = milliseconds(lambda: a @ b, self.device, self.options.rep)
        about = self.sampler.median(since)
        self.add(Cell(when, "bfloat16", 1, 1, 1, n, n), "matmul", "matmul", ms=ms, tflops=2e-9 * n**3 / ms, **about)
        source = torch.randn(size // 4, device=self.device)
        target = torch.empty_like(source)
        ms = milliseconds(lambda: target.copy_(source), self.device, self.options.rep)
        self.add(Cell(when, "float32", 1, 1, 1, size, 1), "copy", "copy", ms=ms, gb_per_s=2e-6 * size / ms)
        self.write()

    def measure(self, task: Task, parts: list[str]) -> None:
        """The passes of one cell: every contender is checked, then all are timed in turns."""
        cell = task.cell
        torch._dynamo.reset()
        problem = Problem(cell, self.device)
        area = problem.area()
        about = {"setting": problem.setting, "area": area, "block_area": problem.block_area()}
        ready, failed = self.judged(problem, self.impls(task), parts[0])
        for part in parts:
            since = time.monotonic()
            times, broken = self.turns(problem, ready, part)
            work = WORK[part] * 4 * cell.B * cell.Hq * cell.D * area
            about |= self.sampler.median(since)
            for name in self.impls(task):
                self.add(cell, part, name, **best(name, part, times, ready, failed | broken, work), **about)
            self.write()

    def judged(self, problem: Problem, names: list[str], part: str) -> tuple[dict[Way, Ready], dict[Way, str]]:
        """The ways to solve a problem whose results are right, and the errors of the others, recorded for `part`."""
        judge = Judge(problem, 128 if self.options.smoke else EVERY_ROW)
        ready: dict[Way, Ready] = {}
        failed: dict[Way, str] = {}
        for way in (Way(name, variant) for name in names for variant in CONTENDERS[name]):
            self.check_time(way.name)
            try:
                attend = CONTENDERS[way.name][way.variant](problem)
                if attend is not None:
                    ready[way] = Ready(attend, judge.errors(attend, self.check_time))
            except OutOfTime:
                raise
            except Exception as error:  # a contender that fails is a result too
                failed[way] = self.failure(problem.cell, part, way.name, error)
        return ready, failed

    def turns(
        self, problem: Problem, ready: dict[Way, Ready], part: str
    ) -> tuple[dict[Way, list[float]], dict[Way, str]]:
        """Milliseconds of each round, interleaved: A B C A B C; and the errors of those that fail now."""
        times: dict[Way, list[float]] = {way: [] for way in ready}
        failed: dict[Way, str] = {}
        for _, way in product(range(self.options.rounds), ready):
            if way in failed:
                continue
            self.check_time()
            function: Callable[[], object] | None = None
            try:
                function = timed_pass(problem, ready[way].attend, part)
                times[way].append(milliseconds(function, self.device, self.options.rep))
            except Exception as error:
                function = None  # its graph holds memory
                failed[way] = self.failure(problem.cell, part, way.name, error)
        return times, failed

    def host(self, task: Task) -> None:
        """The CPU's share of a call; `forward_backward_ms` is that of both passes."""
        torch._dynamo.reset()
        problem, calls = Problem(task.cell, self.device), 5 if self.options.smoke else CALLS
        for name in self.impls(task):
            self.check_time()
            try:
                attend = plain(name, problem)
                functions = [timed_pass(problem, attend, part) for part in ("forward", "forward_backward")]
                forward, both = (host_milliseconds(f, self.device, calls) for f in functions)
                self.add(task.cell, "host", name, ms=forward, forward_backward_ms=both)
            except Exception as error:
                self.add(task.cell, "host", name, error=self.failure(task.cell, "host", name, error))
        self.write()

    def first_call(self, task: Task) -> None:
        """The first forward and backward of a fresh process, with empty caches of compiled code."""
        for name in self.impls(task):
            self.check_time()
            left = self.deadline - time.monotonic()
            arguments = [__file__, "--first-call", name, self.device, *map(str, task.cell)]
            try:
                self.add(task.cell, "first_call", name, ms=in_a_fresh_process(arguments, min(PATIENCE, left)))
            except subprocess.TimeoutExpired as error:
                if left < PATIENCE:
                    raise OutOfTime from None
                self.add(task.cell, "first_call", name, error=short(error))
            except RuntimeError as error:
                self.add(task.cell, "first_call", name, error=short(error))
        self.write()

    def guarded(self, task: Task, parts: list[str]) -> None:
        """`measure`; where inputs or the judge fail, that is recorded for all contenders."""
        try:
            self.measure(task, parts)
        except (OutOfTime, DeviceLost):
            raise
        except Exception as error:
            for part, name in product(self.missing(task), self.impls(task)):
                self.add(task.cell, part, name, error=f"not judged: {short(error)}")
            self.write()
            self.failure(task.cell, parts[-1], "flexattn", error)

    def everything(self, tasks: list[Task]) -> None:
        """All that is missing, until the time is over. Nothing is written where nothing is missing."""
        if not any(map(self.missing, tasks)):
            return print("nothing is left to measure; --again measures again", file=sys.stderr)
        alone: dict[str, Callable[[Task], None]] = {"host": self.host, "first_call": self.first_call}
        with self.sampler:
            self.limits("begin")
            try:
                for task in tasks:
                    parts, cell = self.missing(task), task.cell
                    if not parts:
                        continue
                    self.check_time(*self.impls(task))
                    left = f"{self.deadline - time.monotonic():.0f} s left"
                    print(
                        f"{cell.case} {cell.shape} S{cell.S}: {', '.join(parts)}; {left}", file=sys.stderr, flush=True
                    )
                    if parts[0] in alone:
                        alone[parts[0]](task)
                    else:
                        self.guarded(task, parts)
                    if self.device == "cuda":
                        torch.cuda.empty_cache()
            except OutOfTime:
                print("out of time; the same command goes on", file=sys.stderr)
            self.limits("end")


def best(
    name: str, part: str, times: dict[Way, list[float]], ready: dict[Way, Ready], failed: dict[Way, str], work: float
) -> dict[str, Any]:
    """What is recorded of a contender: the times of its fastest variant, or why it has none."""
    rounds = {way: statistics.median(t) for way, t in times.items() if way.name == name and way not in failed}
    if not rounds:
        return {"error": "; ".join(error for way, error in failed.items() if way.name == name)}
    fastest = min(rounds, key=lambda way: rounds[way])
    ms = rounds[fastest]
    found = {
        "ms": ms,
        "tflops": 1e-9 * work / ms,
        "rounds_ms": times[fastest],
        "max_error": ready[fastest].errors[part],
    }
    if fastest.variant or len(rounds) > 1:
        found |= {"variant": fastest.variant, "variants_ms": {way.variant: t for way, t in rounds.items()}}
    return found


def plain(name: str, problem: Problem) -> Attend:
    """The first variant of a contender."""
    attend = next(iter(CONTENDERS[name].values()))(problem)
    assert attend is not None
    return attend


def first_call(name: str, cell: Cell, device: str) -> None:
    """What a process of its own does: print the milliseconds of the first forward and backward."""
    problem = Problem(cell, device)
    (problem.leaves[0] @ problem.leaves[0].mT).sum().item()  # torch's own start is not counted
    start = time.perf_counter()
    problem.gradients(plain(name, problem))[1].sum().item()
    print(1e3 * (time.perf_counter() - start))


def chosen(options: argparse.Namespace) -> list[Task]:
    """The tasks of the suites that the filters leave."""
    some = lambda value: None if value is None else tuple(value)
    keep = Filter(*map(some, (options.cases, options.lengths, options.shapes, options.parts, options.impls)))
    suites = list(SUITES) if "all" in options.suite else options.suite
    source = SMOKE if options.smoke else [task for name in suites for task in SUITES[name]]
    return list(keep.keep(source, options.dtype))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU, results in a temporary folder")
    made.add_argument("--render", action="store_true", help="only make the tables and plots of the folder of --out")
    made.add_argument("--suite", nargs="+", default=["all"], choices=[*SUITES, "all"], help="in order of importance")
    made.add_argument("--cases", nargs="+", choices=CASES)
    made.add_argument("--lengths", nargs="+", type=int, metavar="S", help="those of the suites")
    made.add_argument("--shapes", nargs="+", choices=SHAPES)
    made.add_argument("--parts", nargs="+", choices=PARTS)
    made.add_argument("--impls", nargs="+", choices=ALL_IMPLS, help="instead of those of the suite")
    made.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    made.add_argument("--rounds", type=int, default=2, help="how often the contenders take turns (2)")
    made.add_argument("--rep", type=int, default=100, help="milliseconds of repetitions of each measurement (100)")
    made.add_argument("--seconds", type=float, default=520, help="stop in time to end after that long (520)")
    made.add_argument("--again", action="store_true", help="measure also what --out has already, failures included")
    made.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>-<date>.json")
    return made


def main() -> None:
    if sys.argv[1:2] == ["--first-call"]:
        name, device, case, dtype, *sizes = sys.argv[2:]
        return first_call(name, Cell(case, dtype, *map(int, sizes)), device)
    options = parser().parse_args()
    if options.render:
        return print(f"written: {render(options.out.parent if options.out else RESULTS)}")
    if options.smoke:
        options.out = options.out or Path(tempfile.mkdtemp()) / "smoke.json"
    elif not torch.cuda.is_available():
        raise SystemExit("This needs a CUDA device. --smoke tries the program on a CPU; bench_cpu.py measures there.")
    elif options.out is None:
        name = short_name(torch.cuda.get_device_name())
        options.out = RESULTS / f"{name}-{datetime.now(timezone.utc):%Y-%m-%d}.json"
    tasks = chosen(options)
    if not tasks:
        raise SystemExit("No problem of the suites is left by these filters: see gpu_suites.py for what there is.")
    start = time.monotonic()
    try:
        Bench(options).everything(tasks)
    except DeviceLost as lost:  # a new process gets the device back
        left = options.seconds - (time.monotonic() - start)
        if math.isfinite(left) and left > 2 * MARGIN:
            print(f"{lost}; going on in a new process", file=sys.stderr, flush=True)
            again = [a for a in sys.argv if a != "--again"]  # else it would meet the same end again
            os.execv(sys.executable, [sys.executable, *again, "--seconds", str(left), "--out", str(options.out)])
        raise SystemExit(f"{lost}; the same command goes on") from None
    print(render(options.out.parent).read_text())
    print(f"written to {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
