"""README.md of a folder of results: goals, tables and plots of every GPU, and links to the other benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpu_contenders import ABOUT
from gpu_goals import GOALS, Measured, verdict
from gpu_suites import ALL_IMPLS, CASES, WORK, Cell
from results import Content, load

MARK = "<!-- Made by benchmarks/bench_gpu.py --render from the files beside it. -->"
RIVALS = tuple(name for name in ALL_IMPLS if name != "flexattn")


def render(folder: Path) -> Path:
    """Write README.md, and plots where matplotlib is installed. Raises rather than overwrite a README of somebody else."""
    page = folder / "README.md"
    if page.exists() and not page.read_text().startswith(MARK):
        raise SystemExit(
            f"{page} was not made by this program and is not overwritten: move it, or choose another folder."
        )
    gpus, others = [], []
    for path in sorted(folder.glob("*.json"), reverse=True):
        content = load(path)
        if content.machine.get("benchmark") == "bench_gpu":
            gpus.append(section(path, content))
        else:
            others.append(link(path))
    if not gpus:
        gpus = ["## GPUs\n\nNothing was measured on a GPU yet: `python benchmarks/bench_gpu.py`."]
    other = ["## Other benchmarks\n\n" + "\n".join(sorted(others))] if others else []
    page.write_text("\n\n".join([f"{MARK}\n\n# Results", *gpus, *other]) + "\n")
    return page


def link(path: Path) -> str:
    """A line for the results of another benchmark: its table, by the title of that."""
    page = path.with_suffix(".md")
    if not page.exists():
        return f"- [{path.stem}]({path.name})"
    title = page.read_text().lstrip().split("\n", 1)[0].lstrip("# ")
    return f"- [{path.stem}]({page.name}): {title}"


def section(path: Path, content: Content) -> str:
    """All that is said about one file."""
    found, about = Measured(content.records), content.machine
    rivals = [n for n in RIVALS if any(n in records for runs in found.runs.values() for records in runs.values())]
    means = ratios(found, rivals)
    parts = [
        f"## {about.get('gpu') or 'A CPU'}: {path.stem}",
        described(about),
        "### Goals\n\n" + goals(found),
        f"### Times of the rivals divided by that of flexattn\n\nAbove 1, flexattn is faster. {WORDS}\n\n"
        + plots(path, found, means)
        + by_case(means, rivals),
        "### TFLOP/s\n\n" + rates(found, rivals),
    ]
    calls = small(found)
    if calls:
        parts.append("### First call and host time\n\n" + calls)
    parts.append("\n".join([*(f"- {name}: {ABOUT[name]}" for name in rivals), *limits(content), *failures(content)]))
    return "\n\n".join(part for part in parts if part)


WORDS = (
    "Geometric means of the problems of a case, each compared within one run. Contenders take turns; each time is the "
    "median of the rounds."
)


def described(about: dict[str, Any]) -> str:
    """The machine in words."""
    known = [f"{k} {v}" for k, v in about.items() if v is not None and not isinstance(v, dict) and k != "benchmark"]
    lines = [", ".join(known)]
    for run, sampled in about.get("sampled", {}).items():
        if sampled.get("samples"):
            sm, power = sampled["sm_mhz"], sampled["power_w"]
            lines.append(
                f"- run of {run}: SM clock {sm['least']:.0f} to {sm['largest']:.0f} MHz, median {sm['median']:.0f}; "
                f"power up to {power['largest']:.0f} W, median {power['median']:.0f}; {sampled['samples']} samples"
            )
    return "\n\n".join([lines[0], "\n".join(lines[1:])]).strip()


def row(*entries: object) -> str:
    return "| " + " | ".join(map(str, entries)) + " |"


def head(*names: str) -> list[str]:
    return [row(*names), "|---" * len(names) + "|"]


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def goals(found: Measured) -> str:
    """Every goal with what was measured."""
    lines = head("goal", "measured", "worst", "problems", "target", "")
    for goal in GOALS:
        v = verdict(goal, found)
        value, worst = ("" if x is None else goal.form.format(x) for x in (v.value, v.worst))
        sign = "<=" if goal.most else ">="
        lines.append(row(goal.name, value, worst, v.count or "", f"{sign} {goal.form.format(goal.target)}", v.words))
    return "\n".join(lines)


class Ratios(NamedTuple):
    """A rival's times divided by ours, of one case and pass."""

    mean: float
    least: float
    count: int


def ratios(found: Measured, rivals: list[str]) -> dict[tuple[str, str, str], Ratios]:
    """By pass, case and rival."""
    values: dict[tuple[str, str, str], list[float]] = {}
    for cell, part in found.runs:
        for rival in rivals if part in WORK else ():
            if pair := found.pair(cell, part, rival):
                values.setdefault((part, cell.case, rival), []).append(pair.theirs["ms"] / pair.ours["ms"])
    return {at: Ratios(statistics.geometric_mean(v), min(v), len(v)) for at, v in values.items()}


def by_case(means: dict[tuple[str, str, str], Ratios], rivals: list[str]) -> str:
    """The means, with the least of the problems."""
    lines = head("pass", "case", *rivals)
    for part in WORK:
        for case in CASES:
            of = [means.get((part, case, rival)) for rival in rivals]
            if any(of):
                lines.append(
                    row(part, case, *(f"{r.mean:.2f} (least {r.least:.2f} of {r.count})" if r else "" for r in of))
                )
    return "\n".join(lines)


def rates(found: Measured, rivals: list[str]) -> str:
    """Absolute numbers of each problem, by its case."""
    lines = head("case", "shape", "S", "pass", "ms", "flexattn", *rivals, "max error")
    order = {name: n for n, name in enumerate((*CASES, *WORK))}
    known = [at for at in found.runs if at[1] in WORK]
    for cell, part in sorted(known, key=lambda at: (order[at[0].case], at[0].shape, at[0].S, order[at[1]])):
        records = found.latest(cell, part)
        said = [
            "" if (r := records.get(name)) is None else "failed" if r["ms"] is None else f"{r['tflops']:.0f}"
            for name in ("flexattn", *rivals)
        ]
        ours = records.get("flexattn", {})
        ms, error = number(ours.get("ms"), ".3f"), number(ours.get("max_error"), ".1e")
        lines.append(row(cell.case, cell.shape, cell.S, part, ms, *said, error))
    return "\n".join(lines)


def small(found: Measured) -> str:
    """Milliseconds of first calls, and of the CPU's share of a call."""
    lines = []
    for cell, part in found.runs:
        if part not in WORK:
            records = found.latest(cell, part)
            times = [row(part.replace("_", " "), name, number(r["ms"], ".3f")) for name, r in records.items()]
            lines += times
    return "\n".join(head("", "", "ms") + sorted(lines)) if lines else ""


def limits(content: Content) -> Iterator[str]:
    """What the GPU could do at the begin and the end of each run."""
    for r in content.records:
        if r["impl"] in ("matmul", "copy"):
            rate = f"{r['tflops']:.0f} TFLOP/s" if r["impl"] == "matmul" else f"{r['gb_per_s']:.0f} GB/s"
            yield f"- {r['impl']} at the {r['case']} of the run of {r['run']}: {rate}"


def failures(content: Content) -> Iterator[str]:
    """A line for each contender and error."""
    alike: dict[tuple[str, str], list[str]] = {}
    for r in content.records:
        if "error" in r:
            cell = Cell.of(r)
            place = f"{cell.case} {cell.shape} S{cell.S} {r['pass']}"
            alike.setdefault((r["impl"], r["error"]), []).append(place)
    for (impl, error), places in alike.items():
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        yield f"- {impl} failed on {', '.join(places[:3])}{more}: {error}"


def plots(path: Path, found: Measured, means: dict[tuple[str, str, str], Ratios]) -> str:
    """The plots' places in the page, or why there are none."""
    try:
        from gpu_plots import plot_rates, plot_ratios
    except ImportError:
        return "Plots need matplotlib: `pip install matplotlib`, then `python benchmarks/bench_gpu.py --render`.\n\n"
    made = [plot_ratios(path, means), plot_rates(path, found)]
    return "".join(f"![{place.stem}]({place.name})\n\n" for place in made if place is not None)
