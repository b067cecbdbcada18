"""Plots of the results of a GPU, as PNG files. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from gpu_goals import Measured
from gpu_suites import ALL_IMPLS, CASES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = 4
PASSES = ("forward", "backward")
COLOURS = dict(zip(ALL_IMPLS, ("#111111", "#d55e00", "#0072b2", "#009e73", "#999999", "#e69f00"), strict=True))


def plot_ratios(path: Path, means: dict[tuple[str, str, str], Any]) -> Path | None:
    """Bars: the geometric mean of each case, a group for each case and a colour for each rival.

    Args:
        path: of the results; the plot stands beside it.
        means: by pass, case and rival, each with a `mean`.
    """
    rivals = [n for n in ALL_IMPLS if any(rival == n for _, _, rival in means)]
    cases = [c for c in CASES if any(case == c for _, case, _ in means)]
    if not rivals:
        return None
    figure, axes = plt.subplots(len(PASSES), 1, figsize=(9, 6), sharex=True, layout="constrained")
    width = 0.8 / len(rivals)
    for axis, part in zip(axes, PASSES, strict=True):
        for n, rival in enumerate(rivals):
            known = [
                (at, means[part, case, rival].mean) for at, case in enumerate(cases) if (part, case, rival) in means
            ]
            places = [at + width * (n - (len(rivals) - 1) / 2) for at, _ in known]
            bars = axis.bar(places, [mean for _, mean in known], width, color=COLOURS[rival], label=rival)
            axis.bar_label(bars, fmt="%.2f", fontsize=6)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_ylabel(f"{part}\nrival's time / flexattn's")
    axes[0].legend(fontsize=8, ncols=len(rivals), loc="lower left", bbox_to_anchor=(0, 1))
    axes[-1].set_xticks(range(len(cases)), cases, rotation=20)
    return written(figure, path.with_name(f"{path.stem}-ratios.png"))


def plot_rates(path: Path, found: Measured) -> Path | None:
    """Lines: TFLOP/s of causal attention by length, a panel for each of the PANELS shapes that have most lengths."""
    lengths: dict[str, set[int]] = {}
    for cell, part in found.runs:
        if cell.case == "causal" and part == "forward":
            lengths.setdefault(cell.shape, set()).add(cell.S)
    several = [shape for shape in sorted(lengths) if len(lengths[shape]) > 1]
    shapes = sorted(several, key=lambda shape: -len(lengths[shape]))[:PANELS]
    if not shapes:
        return None
    figure, axes = plt.subplots(
        len(PASSES), len(shapes), figsize=(3.2 * len(shapes), 6), squeeze=False, sharey="row", layout="constrained"
    )
    for panels, part in zip(axes, PASSES, strict=True):
        for axis, shape in zip(panels, shapes, strict=True):
            for impl in ALL_IMPLS:
                points = sorted(
                    (cell.S, r["tflops"])
                    for cell, which in found.runs
                    if (cell.case, cell.shape, which) == ("causal", shape, part)
                    and (r := found.latest(cell, part).get(impl)) is not None
                    and r["tflops"]
                )
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=COLOURS[impl], label=impl)
            axis.set_xscale("log", base=2)
            axis.set_title(f"causal, {shape}", fontsize=8)
        panels[0].set_ylabel(f"{part}, TFLOP/s")
        panels[0].set_ylim(bottom=0)  # shared, so once all lines are there
    axes[0][0].legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("S")
    return written(figure, path.with_name(f"{path.stem}-tflops.png"))


def written(figure: Any, place: Path) -> Path:
    figure.savefig(place, dpi=130)
    plt.close(figure)
    return place
