"""How long a function takes: on the device, on the CPU, and the first time."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config

# A compiled backward frees its buffers otherwise, and cannot be timed by itself, again and again.
torch._functorch.config.donated_buffer = False

BATCHES = 5  # of calls, whose median is the host time


def milliseconds(function: Callable[[], object], device: str, rep: int) -> float:
    """The median time on the device, from repetitions of `rep` milliseconds, each with a cold L2 cache.

    What takes longer than `rep` is repeated three times. On a CPU, the median of three runs, or of as many as `rep` ends in.
    """
    if device != "cuda":
        times: list[float] = []
        while len(times) < 3 and sum(times) < rep:
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    from triton.testing import do_bench

    function()  # compiles
    if (once := on_device(function)) < rep:
        return float(do_bench(function, warmup=max(1, rep // 4), rep=rep, return_mode="median"))
    return statistics.median([once, on_device(function), on_device(function)])


def on_device(function: Callable[[], object]) -> float:
    """Milliseconds of one run between events."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.empty(1 << 28, dtype=torch.int8, device="cuda").zero_()  # nothing of the run before is left in the L2 cache
    before.record()
    function()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def host_milliseconds(function: Callable[[], object], device: str, calls: int) -> float:
    """Time that a call takes on the CPU: many in a row, none of which is waited for; the median of such batches."""
    taken = []
    for n in (max(1, calls // 10), *[calls] * BATCHES):  # the first ones warm up
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            function()
        taken.append(1e3 * (time.perf_counter() - start) / n)
    return statistics.median(taken[1:])


def timed_pass(problem: Any, attend: Callable[..., torch.Tensor], which: str) -> Callable[[], object]:
    """What is timed for a pass. The backward is repeated on one forward, whose graph it keeps.

    Args:
        problem: has `leaves`, `dout` and `gradients(attend)`.
        attend: of the leaves, to the output.
        which: forward, backward or forward_backward.
    """
    if which == "forward":
        return partial(attend, *problem.leaves)
    if which == "forward_backward":
        return partial(problem.gradients, attend)
    return partial(torch.autograd.grad, attend(*problem.leaves), problem.leaves, problem.dout, retain_graph=True)


def in_a_fresh_process(arguments: list[str], seconds: float) -> float:
    """The number that a script prints last, in a process of its own with empty caches of compiled code.

    Raises:
        RuntimeError: it failed; the last line that it wrote.
        subprocess.TimeoutExpired: it took longer than that.
    """
    with tempfile.TemporaryDirectory() as empty:
        caches = {n: str(Path(empty) / n) for n in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        done = subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, **caches},
            capture_output=True,
            text=True,
            timeout=max(1.0, seconds),
        )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(said[-1])
    return float(done.stdout.split()[-1])


def short(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:200]
