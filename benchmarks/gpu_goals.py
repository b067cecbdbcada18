"""The goals for a GPU: what was measured, as ratios within one run, against what is aimed at."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from gpu_suites import WORK, Cell
from results import Record

LONG_ENOUGH = 8192  # below, a document of the benchmark is not much longer than a block
Found = dict[str, Record]  # by contender


class Pair(NamedTuple):
    """Two records of one run."""

    cell: Cell
    ours: Record
    theirs: Record


class Measured:
    """Records of one file, by run and problem. Only what was measured in one run is compared."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.runs: dict[tuple[Cell, str], dict[str, Found]] = {}
        self.matmuls: dict[str, list[float]] = {}
        for r in sorted(records, key=lambda r: r["run"], reverse=True):  # the latest run first
            if r["impl"] == "matmul":
                self.matmuls.setdefault(r["run"], []).append(r["tflops"])
            elif r["impl"] != "copy":
                self.runs.setdefault((Cell.of(r), r["pass"]), {}).setdefault(r["run"], {})[r["impl"]] = r

    def latest(self, cell: Cell, part: str) -> Found:
        """The latest record of each contender, a time rather than a failure."""
        found: Found = {}
        for records in self.runs.get((cell, part), {}).values():
            for impl, r in records.items():
                if impl not in found or (found[impl]["ms"] is None and r["ms"]):
                    found[impl] = r
        return found

    def pair(self, cell: Cell, part: str, rival: str) -> Pair | None:
        """Ours and a rival's time in the latest run that has both."""
        for records in self.runs.get((cell, part), {}).values():
            ours, theirs = records.get("flexattn"), records.get(rival)
            if ours and theirs and ours["ms"] and theirs["ms"]:
                return Pair(cell, ours, theirs)
        return None

    def pairs(self, part: str, rival: str, where: Where) -> Iterator[Pair]:
        for cell, found in self.runs:
            if found == part and cell in where and (pair := self.pair(cell, part, rival)):
                yield pair

    def cases(self, part: str, case: str, other: str, where: Where) -> Iterator[Pair]:
        """Our times of two cases of the same sizes in one run; `theirs` is that of `other`."""
        for (cell, found), runs in self.runs.items():
            if found != part or cell.case != case or cell not in where:
                continue
            others = self.runs.get((cell._replace(case=other), part), {})
            for run, records in runs.items():
                ours, theirs = records.get("flexattn"), others.get(run, {}).get("flexattn")
                if ours and theirs and ours["ms"] and theirs["ms"]:
                    yield Pair(cell, ours, theirs)
                    break

    def matmul(self, run: str) -> float | None:
        """TFLOP/s of the matrix product, the mean of those at the begin and the end of a run."""
        return statistics.fmean(self.matmuls[run]) if run in self.matmuls else None


class Where(NamedTuple):
    """Some problems in bfloat16; None is any."""

    cases: tuple[str, ...] | None = None
    D: int | None = None
    S: int = 0
    sizes: tuple[int, int, int, int] | None = None  # B, Hq, Hkv, S

    def __contains__(self, cell: object) -> bool:
        assert isinstance(cell, Cell)
        return (
            cell.dtype == "bfloat16"
            and (self.cases is None or cell.case in self.cases)
            and self.D in (None, cell.D)
            and cell.S >= self.S
            and self.sizes in (None, (cell.B, cell.Hq, cell.Hkv, cell.S))
        )


Values = Callable[[Measured], list[float]]


def versus(part: str, rival: str, where: Where) -> Values:
    """A rival's time divided by ours."""
    return lambda found: [p.theirs["ms"] / p.ours["ms"] for p in found.pairs(part, rival, where)]


def of_matmul(part: str, where: Where) -> Values:
    """Our TFLOP/s divided by that of the matrix product of the run."""

    def values(found: Measured) -> list[float]:
        pairs = found.pairs(part, "flexattn", where)
        return [p.ours["tflops"] / rate for p in pairs if (rate := found.matmul(p.ours["run"]))]

    return values


def efficiency(part: str, case: str) -> Values:
    """Time of the same sizes without a mask, times the share of elements that are attended, divided by the time."""

    def values(found: Measured) -> list[float]:
        pairs = found.cases(part, case, "noop", Where(S=LONG_ENOUGH))
        return [p.theirs["ms"] * p.ours["area"] / p.theirs["area"] / p.ours["ms"] for p in pairs]

    return values


def overhead(case: str, where: Where) -> Values:
    """Our time of a case divided by that of causal, of the same sizes."""
    return lambda found: [p.ours["ms"] / p.theirs["ms"] for p in found.cases("forward", case, "causal", where)]


def alone(part: str) -> Values:
    """Our milliseconds."""
    return lambda found: [p.ours["ms"] for p in found.pairs(part, "flexattn", Where())]


def all_passes(rival: str) -> Values:
    return lambda found: [value for part in WORK for value in versus(part, rival, Where())(found)]


def wrong(found: Measured) -> list[float]:
    """How many passes have an error of ours in the place of a time."""
    latest = [found.latest(cell, part).get("flexattn") for cell, part in found.runs]
    return [float(sum(r["ms"] is None for r in latest if r))] if any(latest) else []


class Goal(NamedTuple):
    """What is aimed at.

    Attributes:
        name: for a table.
        values: of what was measured, the numbers whose geometric mean counts.
        target: that the mean should reach, or not exceed.
        most: whether the target is the largest that is good.
        worst: whether the least or largest number counts, not the mean.
        form: how the numbers are written.
    """

    name: str
    values: Values
    target: float
    most: bool = False
    worst: bool = False
    form: str = "{:.2f}"


class Verdict(NamedTuple):
    """A goal and what was measured, None where nothing was; `worst` is the number farthest from the goal."""

    goal: Goal
    value: float | None
    worst: float | None
    count: int

    @property
    def words(self) -> str:
        if self.value is None:
            return "not measured"
        met = self.value <= self.goal.target if self.goal.most else self.value >= self.goal.target
        return "met" if met else "not met"


def verdict(goal: Goal, found: Measured) -> Verdict:
    """Whether a goal is met."""
    values = goal.values(found)
    if not values:
        return Verdict(goal, None, None, 0)
    worst = max(values) if goal.most else min(values)
    return Verdict(goal, worst if goal.worst else statistics.geometric_mean(values), worst, len(values))


DENSE = ("noop", "causal")


def dense_goals() -> Iterator[Goal]:
    """Attention without a mod, full and causal, against each rival and the matrix product."""
    targets = {
        ("forward", 128, 4096): {"torch_flex": 1.6, "sdpa_flash": 1.6, "sdpa_cudnn": 1.0, "matmul": 0.80},
        ("forward", 64, 4096): {"torch_flex": 1.5, "sdpa_flash": 1.4, "sdpa_cudnn": 1.1, "matmul": 0.60},
        ("backward", 128, 8192): {"torch_flex": 1.8, "sdpa_flash": 1.35, "sdpa_cudnn": 0.9, "matmul": 0.60},
        ("backward", 64, 8192): {"torch_flex": 1.6, "sdpa_flash": 1.35, "sdpa_cudnn": 0.9},
    }
    for (part, D, S), rivals in targets.items():
        where = Where(DENSE, D, S)
        for rival, target in rivals.items():
            name = f"{part}, noop and causal, D {D}, S >= {S}: "
            if rival == "matmul":
                yield Goal(name + "TFLOP/s / those of the matrix product", of_matmul(part, where), target)
            else:
                yield Goal(name + f"{rival} / flexattn", versus(part, rival, where), target)


def sparse_goals() -> Iterator[Goal]:
    """Masks and biases."""
    for part in ("forward", "backward"):
        for case in ("document", "sliding_window", "alibi"):
            yield Goal(f"{part}, {case}: torch_flex / flexattn", versus(part, "torch_flex", Where((case,))), 1.7)
        for case in ("document", "sliding_window"):
            yield Goal(f"{part}, {case}: sparse efficiency, S >= {LONG_ENOUGH}", efficiency(part, case), 0.9)


GOALS = (
    *dense_goals(),
    *sparse_goals(),
    *(
        Goal(
            f"forward and backward, TinyLlama-1.1B, S 2048, B {B}: torch_flex / flexattn",
            versus("forward_backward", "torch_flex", Where(D=64, sizes=(B, 32, 4, 2048))),
            target,
        )
        for B, target in ((1, 2.0), (8, 1.7))
    ),
    Goal("every case and pass: least torch_flex / flexattn", all_passes("torch_flex"), 1.0, worst=True),
    *(
        Goal(f"forward, {case}, D 128: time / that of causal", overhead(case, Where(D=128)), target, most=True)
        for case, target in (("alibi", 1.12), ("softcap", 1.18))
    ),
    Goal("passes that flexattn fails", wrong, 0, most=True, worst=True, form="{:.0f}"),
    Goal("first call, forward and backward, ms", alone("first_call"), 3000, most=True, form="{:.0f}"),
    Goal("host time of a call, ms", alone("host"), 0.030, most=True, form="{:.4f}"),
)
