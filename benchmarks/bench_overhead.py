"""Host time of a call: a problem so small that its arithmetic is nothing, so that what is left is the way to it.

Contenders: flexattn in eager mode, flexattn inside `torch.compile(fullgraph=True)`, scaled_dot_product_attention in eager
mode (with the mask or bias as a tensor where it needs one), and compiled torch flex_attention, which has no backward on a
CPU. They take turns in one process; every result is first compared with SDPA's. A breakdown of our call follows.

    python benchmarks/bench_overhead.py            # about three minutes on two cores
    python benchmarks/bench_overhead.py --quick    # fewer rounds, without compiled contenders
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as peer

import flexattn
from flexattn import ops, validate
from flexattn.backends import tiled
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace
from flexattn.codegen.trace_cache import cached_trace
from flexattn.operands import split
from flexattn.problem import Problem

B, H, S, D = 1, 2, 16, 16
CASES = {
    "none": "no mod",
    "causal": "a causal block mask",
    "alibi": "ALiBi with captured slopes, and a causal block mask",
    "mask_mod": "mask_mod=, whose block mask is cached",
    "method": "ALiBi as a method of an nn.Module, and a causal block mask",
}
PASSES = ("forward", "forward, recorded", "forward and backward")
CALLS = 20  # in one measurement

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Record:
    """One measured cell: microseconds a call."""

    case: str
    direction: str
    implementation: str
    median_us: float
    least_us: float


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


class Alibi(torch.nn.Module):
    """Slopes as a model holds them."""

    slopes: Tensor

    def __init__(self, slopes: Tensor) -> None:
        super().__init__()
        self.register_buffer("slopes", slopes)

    def score_mod(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + self.slopes[h] * (kv_idx - q_idx)


def implementations(case: str, compiled: bool) -> dict[str, Attention]:
    """The contenders of a case, by name."""
    slopes = flexattn.mods.alibi_slopes(H)
    module = Alibi(slopes)
    score_mod: Callable[..., Tensor] | None = {
        "alibi": lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx),
        "method": module.score_mod,
    }.get(case)
    ours = flexattn.create_block_mask(causal, None, None, S, S, "cpu") if case not in ("none", "mask_mod") else None
    mask_mod = causal if case == "mask_mod" else None

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flexattn.flex_attention(q, k, v, score_mod, ours, mask_mod=mask_mod)

    bias = None
    if score_mod is not None:
        distance = torch.arange(S) - torch.arange(S).view(-1, 1)
        bias = (slopes.view(-1, 1, 1) * distance).masked_fill(distance > 0, -math.inf)
    is_causal = case in ("causal", "mask_mod")

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=is_causal)

    found: dict[str, Attention] = {"flexattn": flex, "sdpa": sdpa}
    if compiled:
        theirs = None if case == "none" else peer.create_block_mask(causal, None, None, S, S, device="cpu")

        def rival(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return peer.flex_attention(q, k, v, score_mod=score_mod, block_mask=theirs)

        if case != "mask_mod":  # inside a compiled region its block mask is built at every call, and warns
            found["flexattn compiled"] = torch.compile(flex, fullgraph=True, dynamic=False)
        found["torch flex compiled"] = torch.compile(rival, fullgraph=True, dynamic=False)
    return found


def inputs(requires_grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, S, D, generator=generator).requires_grad_(requires_grad) for _ in range(3)]


def once(direction: str, run: Attention) -> Callable[[], None]:
    """One call of a contender in one direction."""
    tensors = inputs(requires_grad=direction != "forward")
    grad = torch.ones(B, H, S, D)

    def forward() -> None:
        with torch.no_grad():
            run(*tensors)

    def recorded() -> None:
        run(*tensors)

    def both() -> None:
        torch.autograd.grad(run(*tensors), tensors, grad)

    return {"forward": forward, "forward, recorded": recorded, "forward and backward": both}[direction]


def interleaved(contenders: dict[Any, Callable[[], object]], rounds: int) -> dict[Any, tuple[float, float]]:
    """Median and least microseconds a call of each, measured in turns."""
    for call in contenders.values():
        for _ in range(5):
            call()
    times: dict[Any, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append(1e6 * (time.perf_counter() - start) / CALLS)
    return {name: (statistics.median(t), min(t)) for name, t in times.items()}


def measure(case: str, rounds: int, compiled: bool) -> list[Record]:
    torch._dynamo.reset()
    found = implementations(case, compiled)
    exact = found["sdpa"](*inputs())
    contenders: dict[tuple[str, str], Callable[[], object]] = {}
    for name, run in found.items():
        for direction in PASSES:
            if name == "torch flex compiled" and direction != "forward":
                continue
            with torch.no_grad():
                error = (run(*inputs()) - exact).abs().max().item()
            if error > 1e-5:
                raise SystemExit(f"{name} is wrong on {case}: it differs from SDPA by {error:.1e}")
            contenders[direction, name] = once(direction, run)
    return [
        Record(case, direction, name, *times) for (direction, name), times in interleaved(contenders, rounds).items()
    ]


def breakdown(case: str, rounds: int) -> dict[str, float]:
    """Least microseconds of the parts of our eager forward; each part is called by itself."""
    slopes = flexattn.mods.alibi_slopes(H)
    score_mod = Alibi(slopes).score_mod if case in ("alibi", "method") else None
    block = None if case == "none" else flexattn.create_block_mask(causal, None, None, S, S, "cpu")
    mask_mod, lists = (None, ()) if block is None else (causal, block.kv_lists())
    q, k, v = inputs()
    program, captured, ints = trace(score_mod, mask_mod)
    inside, floats = split(captured, program)
    size = (128, 128)
    problem = Problem(q, k, v, captured, lists, ints, size, variant(program), D**-0.5)

    def front() -> None:
        validate.choices(block, None, False, None, "auto", None)
        validate.tensors(q, k, v, False)
        if block is not None:
            validate.block_mask(block, q, k)

    parts: dict[str, Callable[[], object]] = {
        "whole call": lambda: flexattn.flex_attention(q, k, v, score_mod, block),
        "validation": front,
        "a fresh trace": lambda: trace(score_mod, mask_mod),
        "the cached trace": lambda: cached_trace(score_mod, mask_mod, device=q.device),
        "operator, dispatched": lambda: ops.FORWARD(
            q, k, v, inside, list(lists), ints, floats, list(size), program, D**-0.5, "tiled", ""
        ),
        "operator": lambda: ops.attention(q, k, v, inside, lists, ints, floats, size, program, D**-0.5, "tiled", ""),
        "of which backend": lambda: tiled.forward(problem),
    }
    with torch.no_grad():
        return {name: least for name, (_, least) in interleaved(parts, rounds).items()}


def report(records: list[Record], parts: dict[str, dict[str, float]]) -> str:
    """The tables, in Markdown."""
    cell = {(r.case, r.direction, r.implementation): r for r in records}
    names = list(dict.fromkeys(r.implementation for r in records))
    lines = ["Microseconds a call, median (least):", ""]
    lines.append("| case | pass | " + " | ".join(names) + " | flexattn less sdpa |")
    lines.append("|---" * (len(names) + 3) + "|")
    for case in dict.fromkeys(r.case for r in records):
        for direction in PASSES:
            row = [case, direction]
            for name in names:
                r = cell.get((case, direction, name))
                row.append("" if r is None else f"{r.median_us:.0f} ({r.least_us:.0f})")
            ours, sdpa = (cell[case, direction, name] for name in ("flexattn", "sdpa"))
            row.append(f"{ours.median_us - sdpa.median_us:.0f} ({ours.least_us - sdpa.least_us:.0f})")
            lines.append("| " + " | ".join(row) + " |")
    lines += ["", "Parts of an eager forward, least microseconds, each called by itself:", ""]
    titles = list(next(iter(parts.values())))
    lines.append("| case | " + " | ".join(titles) + " |")
    lines.append("|---" * (len(titles) + 1) + "|")
    for case, times in parts.items():
        lines.append(f"| {case} | " + " | ".join(f"{times[t]:.1f}" for t in titles) + " |")
    lines += ["", *(f"- {name}: {meaning}" for name, meaning in CASES.items())]
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables and, with --out, write them and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, eager contenders only")
    parser.add_argument("--smoke", action="store_true", help="one round of two cases, to see that it runs")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, help="write PATH.json and PATH.md")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a problem of this size has work for one
    rounds = 1 if options.smoke else 100 if options.quick else options.rounds
    cases = ["none", "method"] if options.smoke else options.cases
    records: list[Record] = []
    parts: dict[str, dict[str, float]] = {}
    for case in cases:
        print(f"{case} ...", file=sys.stderr, flush=True)
        records += measure(case, rounds, compiled=not (options.quick or options.smoke))
        if case != "mask_mod":
            parts[case] = breakdown(case, rounds)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "flexattn": flexattn.__version__,
        "python": platform.python_version(),
    }
    text = ", ".join(f"{k} {v}" for k, v in machine.items()) + "\n\n" + report(records, parts)
    print(text)
    if options.out:
        content = {"machine": machine, "records": [asdict(r) for r in records], "parts_us": parts}
        options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(
            f"# Host time of a call on a CPU, {time.strftime('%Y-%m-%d')}\n\n`python benchmarks/bench_overhead.py`; "
            f"B={B}, H={H}, S={S}, D={D} in float32, contenders in turns, {rounds} rounds of {CALLS} calls.\n\n{text}\n"
        )


if __name__ == "__main__":
    main()
