"""How long each contender takes: compared first, then timed in turns, medians of the rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexattn.api import flex_attention
from flexattn.backends.timer import Timer, event_timer

from .contenders import CONTENDERS, DENSE, OURS, Attend, NotRun, Problem
from .failures import reading, told
from .output import Output

LEAST_ROUNDS, MOST_ROUNDS = 3, 200
WAYS = ("forward", "backward")


@dataclass
class Row:
    """A contender's times.

    Attributes:
        name: of the contender.
        attend: what is timed, or None.
        not_run: why it, or its backward, is not timed.
        differs: where its result is not that of flexattn.
        milliseconds: of each round, by direction.
    """

    name: str
    attend: Attend | None = None
    not_run: str = ""
    differs: str = ""
    milliseconds: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})

    def median(self, way: str) -> float | None:
        """The median of a direction, or None."""
        times = self.milliseconds[way]
        return statistics.median(times) if times else None

    def to_dict(self, ours: Row) -> dict[str, Any]:
        """Medians, and how many times those of `ours` they are."""
        made: dict[str, Any] = {"name": self.name}
        for way in WAYS:
            own, base = self.median(way), ours.median(way)
            made[f"{way}_ms"] = own
            made[f"{way}_ratio"] = None if own is None or base is None else own / base
        rounds = max(len(times) for times in self.milliseconds.values())
        return made | {"rounds": rounds, "not_run": self.not_run or None, "differs": self.differs or None}


def measure(problem: Problem, seconds: float, output: Output) -> list[Row]:
    """The rows of all contenders, flexattn's first. Results are compared with flexattn's; one that differs is not timed."""
    rows: list[Row] = []
    results: dict[str, list[Tensor]] = {}
    largest = 0.0
    for name, make in CONTENDERS.items():
        output.progress(f"{problem.mods.text}, L={problem.sizes[2]}: {name}")
        row = Row(name)
        rows.append(row)
        try:
            with reading(problem.mods.text) if name == OURS else nullcontext():
                row.attend = make(problem)
                results[name] = _results(row, problem)
            if name == OURS:
                largest = _largest_score(problem)
            row.differs = _difference(results[name], results[OURS], problem, largest)
            if (
                row.differs
                and name == DENSE
                and problem.mods.score_mod is not None
                and problem.query.element_size() == 2
            ):
                row.differs += f". It takes the bias in {problem.dtype}, which rounds it"
        except NotRun as reason:
            row.not_run = str(reason)
        except Exception as error:
            if name == OURS:
                raise
            row.not_run = f"not run: it failed: {told(error).splitlines()[0]}"
        if row.differs or name not in results:
            row.attend = None
    _take_turns(rows, results, problem, seconds)
    return rows


def _results(row: Row, problem: Problem) -> list[Tensor]:
    """Output, and gradients where there are any; also the first run, which compiles."""
    assert row.attend is not None
    inputs = (problem.query, problem.key, problem.value)
    if row.name != OURS and problem.device == "cpu" and "compiled" in row.name:
        row.not_run = "backward not run: PyTorch's flex_attention has none on a CPU"
        return [row.attend(*inputs).detach()]
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = row.attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, problem.value)]


def _largest_score(problem: Problem) -> float:
    """The largest magnitude of a row's maximum: a weight is off by as many roundings."""
    with torch.no_grad():
        _, lse = flex_attention(
            problem.query, problem.key, problem.value, problem.mods.score_mod, problem.block, return_lse=True
        )
    return float(lse.masked_fill(~lse.isfinite(), 0.0).abs().max())


def _difference(found: list[Tensor], ours: list[Tensor], problem: Problem, largest: float) -> str:
    """Where results differ by more than roundings do; a mask that is wrong for a part of the rows differs by far more.

    Distances are relative, in the Euclidean norm. Rows without keys are NaN in some implementations: they are left out.
    """
    limit = 8 * torch.finfo(getattr(torch, problem.dtype)).eps + (128 + 2 * largest) * torch.finfo(torch.float32).eps
    for name, a, b in zip(
        ("output", "gradient of query", "gradient of key", "gradient of value"), found, ours, strict=False
    ):
        a, b = a.double(), b.double()
        a = torch.where((b == 0) & a.isnan(), 0.0, a)
        distance = float((a - b).norm() / b.norm().clamp(min=torch.finfo(torch.float32).tiny))
        if not distance <= limit:
            return (
                f"not timed: its {name} is not flexattn's: relative distance {distance:.2g}, roundings give {limit:.2g}"
            )
    return ""


def _take_turns(rows: list[Row], results: dict[str, list[Tensor]], problem: Problem, seconds: float) -> None:
    timer = event_timer(torch.device("cuda")) if problem.device == "cuda" else _wall
    runs = [
        (row.milliseconds[way], row.attend, way)
        for row in rows
        for way in WAYS
        if row.attend is not None and (way == "forward" or len(results[row.name]) > 1)
    ]
    end = time.perf_counter() + seconds * len(runs)
    while len(runs[0][0]) < LEAST_ROUNDS or (time.perf_counter() < end and len(runs[0][0]) < MOST_ROUNDS):
        for times, attend, way in runs:
            times.append(_once(attend, way, problem, timer))


def _once(attend: Attend, way: str, problem: Problem, timer: Timer) -> float:
    """Milliseconds of one forward, or of one backward alone."""
    inputs = (problem.query, problem.key, problem.value)
    if way == "forward":
        with torch.no_grad():
            return timer(lambda: _drop(attend(*inputs)))
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = attend(*leaves)
    return timer(lambda: _drop(torch.autograd.grad(out, leaves, problem.value)))


def _drop(result: object) -> None:
    """Nothing is kept of a run."""


def _wall(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)
