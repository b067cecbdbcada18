"""The page of `bench_variants.py`: which way was fastest, and every way of every pass."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from gpu_report import described
from results import Record

TITLE = "Ways through flexattn's own kernels"
WORDS = (
    "Ratio: time of the default divided by that of this way; above 1, it is faster than the default. Kernels: registers of a "
    "thread, bytes of it spilled, KiB of shared memory, of the configuration in brackets."
)


def page(about: dict[str, Any], records: list[Record]) -> str:
    """The page, in Markdown."""
    parts = [f"# {TITLE}", described(about), WORDS, summary(records)]
    for (cell, part), group in groupby(records, key=lambda r: (r["cell"], r["pass"])):
        parts.append(f"## {cell}, {part}\n\n" + table([*group]))
    return "\n\n".join(p for p in parts if p) + "\n"


def summary(records: list[Record]) -> str:
    """For each pass and head dimension, all ways by the geometric mean of their ratios, fastest first."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for r in records:
        if r.get("ratio"):
            found.setdefault((r["pass"], r["D"]), {}).setdefault(r["variant"], []).append(r["ratio"])
    lines = []
    for (part, D), ways in sorted(found.items(), key=lambda item: (-item[0][1], item[0][0])):
        for name, ratios in sorted(ways.items(), key=lambda item: -statistics.geometric_mean(item[1])):
            mean, least = statistics.geometric_mean(ratios), min(ratios)
            lines.append(f"| {part} | {D} | {name} | {mean:.3f} | {least:.3f} | {len(ratios)} |")
    head = "| pass | D | way | mean ratio | least | problems |\n|---|---|---|---|---|---|\n"
    return "## Over all problems\n\n" + head + "\n".join(lines) if lines else ""


def table(records: list[Record]) -> str:
    """One line for each way; those that failed say why."""
    fastest = min((r["ms"] for r in records if r.get("ms")), default=None)
    head = "| way | ms | TFLOP/s | ratio | kernels |\n|---|---|---|---|---|\n"
    return head + "\n".join(line(r, r.get("ms") == fastest) for r in records)


def line(r: Record, bold: bool = False) -> str:
    """A row of the table."""
    if r.get("error"):
        return f"| {r['variant']} | failed | | | {r['error'].replace('|', ' ')} |"
    number: Callable[[str, str], str] = lambda name, form: "" if r.get(name) is None else format(r[name], form)
    name = f"**{r['variant']}**" if bold and r.get("ms") else r["variant"]
    times = " | ".join(number(n, f) for n, f in (("ms", ".4f"), ("tflops", ".1f"), ("ratio", ".3f")))
    return f"| {name} | {times} | {'; '.join(kernels_text(r['kernels']))} |"


def kernels_text(kernels: list[Record]) -> Iterator[str]:
    """What each kernel needs."""
    for k in kernels:
        c = k["config"]
        ways = [name for name, value in c.items() if value is True]
        words = " ".join([f"{c['BLOCK_M']}x{c['BLOCK_N']} w{c['num_warps']} s{c['num_stages']}", *ways])
        yield f"{k['registers']}/{k['spilled']}/{k['shared'] / 1024:.0f} [{k['pass']} {words}]"
