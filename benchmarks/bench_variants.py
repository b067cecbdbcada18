"""Every way through flexattn's own kernels, side by side: by pointers and by TMA, tiles, one pass and two, orders.

The rows of `flexattn/config.py` are set by these times. The default is first compared with float64, every other way with the
default; then they take turns, each with a cold L2 cache between two events of the device, and the median counts. The passes
dq and dkdv are one kernel each; backward is all of it, from delta to the last sum.

    python benchmarks/bench_variants.py                             # what fits into --seconds
    python benchmarks/bench_variants.py --cells causal D128-S8192   # names that have one of these words
    python benchmarks/bench_variants.py --passes forward --variants default overlap
    python benchmarks/bench_variants.py --target sm_90              # registers and spills alone, without a device
    TRITON_INTERPRET=1 python benchmarks/bench_variants.py --smoke  # tiny shapes on a CPU, once each: does the program work

Kernels are compiled by many processes before anything is timed. TFLOP/s count attended elements alone: 4 * B * Hq * D for
each in the forward, 2.5 times that in a backward; dq and dkdv are counted with all their products, 1.5 and 2 times that.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from datetime import datetime, timezone
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_contenders import ours
from gpu_judge import EVERY_ROW, Judge
from gpu_machine import Sampler, machine, short_name
from gpu_problem import Problem
from gpu_suites import Cell
from gpu_variants import CELLS, PASSES, SMOKE, WORK, Variant, cell_name, variants
from results import Record, load, save
from timing import short
from torch import Tensor
from variant_steps import Steps, Ways, compile_one, needed, run_all, switched
from variants_report import line, page

from flexattn.backends.agreement import agree
from flexattn.backends.target import Target, current, interpreted, named
from flexattn.backends.timer import Timer, event_timer

RESULTS = Path(__file__).parent / "results"
MARGIN = 5.0  # seconds before the deadline at which nothing more is timed
HOPELESS = 3.0  # times the default, in the first round: not run again
JUDGED = "float64"  # the name under which a problem's failure is recorded
SHARE = 0.5  # of the time, for compiling ahead; what is left over is compiled when it is needed


class DeviceLost(Exception):
    """The GPU takes no more work from this process."""


class Task(NamedTuple):
    """A pass of a cell and the ways to compare, the default first."""

    cell: Cell
    part: str
    ways: list[Variant]


def host_timer(run: Callable[[], None]) -> float:
    """Milliseconds of a run on the CPU."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


class Bench:
    """The records so far, where they are written, and the time that is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, "cpu" if options.smoke else "cuda"
        self.deadline = time.monotonic() + options.seconds - (0 if options.smoke else MARGIN)
        self.records: list[Record] = load(options.out).records if options.resume else []
        self.machine = machine(self.device) | {"benchmark": "bench_variants", "rounds": options.rounds}
        self.sampler = Sampler(self.device)
        self.timer: Timer = host_timer if options.smoke else event_timer(torch.device("cuda"))

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self.deadline

    def write(self) -> None:
        sampled = {f"{datetime.now(timezone.utc):%H:%M}": self.sampler.summary()}
        about = self.machine | {"sampled": sampled}
        save(self.options.out, about, self.records, page(about, self.records))

    def add(self, task: Task, way: Variant, **values: Any) -> None:
        """A new record, also shown."""
        about = {"cell": cell_name(task.cell), **task.cell._asdict(), "pass": task.part, "variant": way.name}
        record = {**about, "options": dict(way.options), "switches": way.switches, "kernels": [], **values}
        self.records.append(record)
        print(f"{about['cell']} {task.part} {line(record)}", flush=True)

    def failed(self, task: Task, way: Variant, error: Exception) -> None:
        """Record an error. Raises DeviceLost if the device is gone too."""
        words, fatal = short(error), False
        error.__traceback__ = None  # it holds tensors
        try:
            self.clean()
        except Exception:
            fatal = True
        self.add(task, way, error=words, fatal=fatal)
        self.write()
        if fatal:
            raise DeviceLost(words)

    def clean(self) -> None:
        """Free what nothing holds any more; raises if the device is lost."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def everything(self, tasks: list[Task]) -> None:
        """All tasks that are left, until the time is over."""
        lost = {(r["cell"], r["pass"], r["variant"]) for r in self.records if r.get("fatal")}
        done = {(r["cell"], r["pass"]) for r in self.records if r.get("ms")}
        wrong = {r["cell"] for r in self.records if r["variant"] == JUDGED}
        over = lambda cell, part: (cell, part) in done or cell in wrong
        left = [t for t in tasks if not over(cell_name(t.cell), t.part)]
        self.records = [r for r in self.records if r.get("fatal") or over(r["cell"], r["pass"])]
        if self.device == "cuda" and not self.options.resume:
            until = time.monotonic() + SHARE * (self.deadline - time.monotonic())
            count = sum(1 for _ in compiled(left, current(), until))
            print(f"{count} compiled, {self.deadline - time.monotonic():.0f} s left", file=sys.stderr, flush=True)
        cell, ways, area = None, None, 0
        with self.sampler:
            for task in left:
                if self.late:
                    print("out of time; --resume goes on", file=sys.stderr)
                    break
                if task.cell != cell:
                    cell, ways = task.cell, None
                    self.clean()
                    ways, area = self.prepared(task)
                if ways is not None:
                    name = cell_name(task.cell)
                    kept = [way for way in task.ways if (name, task.part, way.name) not in lost]
                    self.measure(task._replace(ways=kept), ways, area)
            self.write()

    def prepared(self, task: Task) -> tuple[Ways | None, int]:
        """A cell's operands and attended elements; none where the library's own result is not right."""
        problem = Problem(task.cell, self.device)
        try:
            Judge(problem, 128 if self.options.smoke else EVERY_ROW).errors(ours(problem))
            return Ways(problem), problem.area()
        except Exception as error:
            self.failed(task, Variant(JUDGED, {}), error)
            return None, 0

    def measure(self, task: Task, ways: Ways, area: int) -> None:
        """Compare every way with the default, then time them in turns."""
        since = time.monotonic()
        ready: dict[str, Callable[[], None]] = {}
        kernels: dict[str, list[Record]] = {}
        expected: list[Tensor] = []
        for way in task.ways:
            if self.late:
                return  # ways are only compared within one run
            try:
                steps = ways.steps(task.part, way)
                with switched(way.switches):
                    kernels[way.name] = [] if interpreted() else needed(steps, None)
                expected = checked(steps, way, expected)
                ready[way.name] = partial(run_all, steps.timed)
            except Exception as error:
                self.failed(task, way, error)
                if not expected:
                    return  # there is nothing to compare with
        work = WORK[task.part] * 4 * task.cell.B * task.cell.Hq * task.cell.D * area
        times = self.turns(task, ready)
        about = self.sampler.median(since)
        default = times.get("default", [])
        for way in task.ways:
            if (taken := times.get(way.name)) and default:
                ms = statistics.median(taken)
                found = {"ms": ms, "tflops": 1e-9 * work / ms, "ratio": statistics.median(default) / ms}
                self.add(task, way, **found, rounds_ms=taken, kernels=kernels[way.name], **about)
        self.write()

    def turns(self, task: Task, ready: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
        """Milliseconds of each round: A B C A B C. One that fails now is recorded, and is not in the result."""
        times: dict[str, list[float]] = {name: [] for name in ready}
        by_name = {way.name: way for way in task.ways}
        for n in range(self.options.rounds):
            if n and self.late:
                break
            for name in [*times]:
                if n and times[name][0] > HOPELESS * times["default"][0]:
                    continue
                try:
                    with switched(by_name[name].switches):
                        times[name].append(self.timer(ready[name]))
                except Exception as error:
                    del times[name], ready[name]
                    self.failed(task, by_name[name], error)
                    if name == "default":
                        return {}
        return times


def checked(steps: Steps, way: Variant, expected: list[Tensor]) -> list[Tensor]:
    """Run the steps; raise unless they compute what is expected, which the default's results become."""
    with switched(way.switches):
        run_all([*steps.before, *steps.timed])
        if steps.outputs()[0].is_cuda:
            torch.cuda.synchronize()
    found = steps.outputs()
    if not expected:
        return [t.clone() for t in found]
    if not agree(found, expected, steps.calls[0].product):
        raise ValueError("wrong: its result is not the default's, up to rounding")
    return expected


def compiled(
    tasks: list[Task], target: Target, until: float | None = None
) -> Iterator[tuple[Task, Variant, list[Record] | str]]:
    """Resources of every kernel, or the error; compiled in processes of their own, so that Triton's cache has them."""
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=get_context("spawn")) as pool:
        pairs = [(t, way) for t in tasks for way in t.ways]
        futures = [pool.submit(compile_one, t.cell, t.part, way, target) for t, way in pairs]
        for (task, way), future in zip(pairs, futures, strict=True):
            try:
                yield task, way, future.result(None if until is None else max(0.0, until - time.monotonic()))
            except OutOfTime:
                pool.shutdown(wait=False, cancel_futures=True)
                return


def chosen(options: argparse.Namespace) -> list[Task]:
    """What the filters leave. The default is always there, since the others are compared with it."""
    asked = lambda words, name: words is None or any(word in name for word in words)
    found = []
    for cell in SMOKE if options.smoke else CELLS:
        for part in PASSES:
            ways = [way for way in variants(part, cell) if way.name == "default" or asked(options.variants, way.name)]
            if part in options.passes and asked(options.cells, cell_name(cell)):
                found.append(Task(cell, part, ways))
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--smoke", action="store_true", help="tiny shapes in Triton's interpreter, which must be on")
    made.add_argument("--target", help="only compile, for this one: sm_90")
    made.add_argument("--cells", nargs="+", metavar="WORD", help="problems whose names have one of these in them")
    made.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    made.add_argument("--variants", nargs="+", metavar="WORD", help="ways whose names have one of these in them")
    made.add_argument("--rounds", type=int, help="how often all take turns (12; with --smoke 1)")
    made.add_argument("--seconds", type=float, default=300, help="stop in time to end after that long (300)")
    made.add_argument("--resume", action="store_true", help="leave out what --out has already")
    made.add_argument("--out", type=Path, help="default: benchmarks/results/variants-<gpu>-<date>.json")
    return made


def main() -> None:
    options = parser().parse_args()
    options.rounds = options.rounds or (1 if options.smoke else 12)
    tasks = chosen(options)
    if not tasks:
        raise SystemExit("No problem has such a name: see gpu_variants.py for what there is.")
    if options.target:
        for task, way, found in compiled(tasks, named(options.target)):
            record = {"variant": way.name, **({"error": found} if isinstance(found, str) else {"kernels": found})}
            print(f"{cell_name(task.cell)} {task.part} {line(record)}", flush=True)
        return
    if options.smoke:
        if not interpreted():
            raise SystemExit("--smoke runs kernels on a CPU: set TRITON_INTERPRET=1.")
        options.out = options.out or Path(tempfile.mkdtemp()) / "smoke.json"
    elif not torch.cuda.is_available() or interpreted():
        raise SystemExit("This needs a CUDA device, without TRITON_INTERPRET=1. --smoke tries it on a CPU.")
    elif options.out is None:
        name = short_name(torch.cuda.get_device_name())
        options.out = RESULTS / f"variants-{name}-{datetime.now(timezone.utc):%Y-%m-%d}.json"
    start = time.monotonic()
    try:
        Bench(options).everything(tasks)
    except DeviceLost as lost:  # a new process gets the device back
        left = options.seconds - (time.monotonic() - start)
        if left > 2 * MARGIN:
            print(f"{lost}; going on in a new process", file=sys.stderr, flush=True)
            more = ["--resume", "--seconds", str(left), "--out", str(options.out)]
            os.execv(sys.executable, [sys.executable, *sys.argv, *more])
    print(f"written to {options.out} and {options.out.with_suffix('.md').name}", file=sys.stderr)


if __name__ == "__main__":
    main()
