"""Attention on a CPU: the tiled backend beside its rivals, in one process, one run, one table.

Rivals: compiled torch flex_attention (forward only: it has no backward on a CPU), scaled_dot_product_attention (with a
materialised mask or bias where it needs one), and dense eager attention in plain torch. Contenders take turns, the
median of the rounds is reported, and every result is first compared with float64.

    python benchmarks/bench_cpu.py                 # about ten minutes on two cores
    python benchmarks/bench_cpu.py --quick         # float32, two rounds, the first shape only
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
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

SHAPES = {"B1 H8 S4096 D64": (1, 8, 4096, 64), "B1 H16 S2048 D128": (1, 16, 2048, 128)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = ("noop", "causal", "sliding_window", "document", "alibi")
IMPLEMENTATIONS = ("flexattn", "torch_flex", "sdpa", "dense")
WINDOW, DOCUMENTS = 512, 8


@dataclass
class Record:
    """One measured cell; `ms` is a median, `extra_mib` the growth of the peak resident memory of a fresh process."""

    shape: str
    dtype: str
    case: str
    direction: str
    implementation: str
    ms: float
    extra_mib: float | None = None


class Problem:
    """Inputs of one cell and the callables that solve it, all returning the output."""

    def __init__(self, shape: str, dtype: str, case: str) -> None:
        B, H, S, D = SHAPES[shape]
        g = torch.Generator().manual_seed(0)
        self.tensors = [torch.randn(B, H, S, D, generator=g).to(DTYPES[dtype]) for _ in range(3)]
        self.case, self.S, self.H = case, S, H
        # Documents of natural, uneven lengths.
        cuts = torch.randperm(S - 1, generator=g)[: DOCUMENTS - 1].sort().values + 1
        self.documents = torch.bucketize(torch.arange(S), cuts, right=True)
        self.slopes = flexattn.mods.alibi_slopes(H)

    def mask_mod(self) -> Callable[..., Tensor] | None:
        documents = self.documents
        return {
            "causal": lambda b, h, q, k: q >= k,
            "sliding_window": lambda b, h, q, k: (q >= k) & (q - k < WINDOW),
            "document": lambda b, h, q, k: documents[q] == documents[k],
        }.get(self.case)

    def score_mod(self) -> Callable[..., Tensor] | None:
        slopes = self.slopes
        return (lambda s, b, h, q, k: s + slopes[h] * (k - q)) if self.case == "alibi" else None

    def bias(self) -> Tensor | None:
        """The mask, or the bias, as a dense tensor."""
        if self.case == "alibi":
            distance = torch.arange(self.S) - torch.arange(self.S).view(-1, 1)
            return (self.slopes.view(-1, 1, 1) * distance).to(self.tensors[0].dtype)
        mod = self.mask_mod()
        if mod is None:
            return None
        return flexattn.create_mask(mod, None, None, self.S, self.S, "cpu")[0, 0]

    def implementation(self, name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        score_mod, mask_mod, S = self.score_mod(), self.mask_mod(), self.S
        if name == "flexattn":
            block = None if mask_mod is None else flexattn.create_block_mask(mask_mod, None, None, S, S, "cpu")
            return lambda q, k, v: flexattn.flex_attention(q, k, v, score_mod, block)
        if name == "torch_flex":
            compiled = torch.compile(peer.flex_attention, dynamic=False)
            theirs = None if mask_mod is None else peer.create_block_mask(mask_mod, None, None, S, S, device="cpu")
            return lambda q, k, v: compiled(q, k, v, score_mod=score_mod, block_mask=theirs)
        if name == "sdpa":
            if self.case in ("noop", "causal"):
                return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=self.case == "causal")
            bias = self.bias()
            return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        bias = self.bias()

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = (q @ k.mT) * (1 / math.sqrt(q.shape[-1]))
            if bias is not None:
                scores = scores + bias if bias.is_floating_point() else scores.masked_fill(~bias, -math.inf)
            return torch.softmax(scores.float(), -1).to(q.dtype) @ v

        return dense


def check(problem: Problem, run: Callable[..., Tensor], name: str) -> None:
    """Each timed result lies within a small multiple of its dtype's rounding of float64, on two heads and 256 rows."""
    rows = slice(problem.S // 2, problem.S // 2 + 256)
    q, k, v = (t[:, :2].double() for t in problem.tensors)
    scores = q[:, :, rows] @ k.mT / math.sqrt(q.shape[-1])
    if problem.case == "alibi":
        distance = torch.arange(problem.S) - torch.arange(problem.S).view(-1, 1)
        scores = scores + problem.slopes[:2].double().view(-1, 1, 1) * distance[rows]
    elif (keep := problem.bias()) is not None:
        scores = scores.masked_fill(~keep[rows], -math.inf)
    exact = torch.softmax(scores, -1) @ v
    error = (run(*problem.tensors)[:, :2, rows].double() - exact).abs().max().item()
    # exp turns an error of a score into a relative error of its weight; SDPA and dense hold a bias in the input's dtype.
    held = torch.float32 if name in ("flexattn", "torch_flex") else problem.tensors[0].dtype
    magnitude = scores[scores.isfinite()].abs().max().item()
    limit = 8 * (torch.finfo(problem.tensors[0].dtype).eps + torch.finfo(held).eps * magnitude)
    if error > limit:
        raise SystemExit(f"{name} is wrong on {problem.case}: error {error:.2e}, allowed {limit:.2e}")


def backward(run: Callable[..., Tensor], problem: Problem) -> Callable[[], float]:
    """Time of the backward alone, in seconds."""
    leaves = [t.detach().requires_grad_() for t in problem.tensors]
    grad = torch.randn_like(problem.tensors[2])

    def timed() -> float:
        out = run(*leaves)
        start = time.perf_counter()
        torch.autograd.grad(out, leaves, grad)
        return time.perf_counter() - start

    return timed


def forward(run: Callable[..., Tensor], problem: Problem) -> Callable[[], float]:
    def timed() -> float:
        with torch.no_grad():
            start = time.perf_counter()
            run(*problem.tensors)
            return time.perf_counter() - start

    return timed


def measure(shape: str, dtype: str, case: str, rounds: int) -> list[Record]:
    torch._dynamo.reset()
    problem = Problem(shape, dtype, case)
    contenders: dict[tuple[str, str], Callable[[], float]] = {}
    for name in IMPLEMENTATIONS:
        run = problem.implementation(name)
        check(problem, run, name)
        contenders["forward", name] = forward(run, problem)
        if name != "torch_flex":
            contenders["backward", name] = backward(run, problem)
    for timed in contenders.values():
        timed()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in contenders}
    for _ in range(rounds):  # interleaved: A B C A B C
        for key, timed in contenders.items():
            times[key].append(timed())
    return [
        Record(shape, dtype, case, direction, name, 1e3 * statistics.median(t))
        for (direction, name), t in times.items()
    ]


def peak() -> int:
    """Peak resident memory in KiB. Not getrusage: its maximum is inherited from the parent process."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def reset_peak() -> int:
    """Forget the peak so far; what is resident now, in KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def extra_memory(shape: str, dtype: str, case: str, name: str, length: int | None = None) -> float:
    """MiB that a forward (and where there is one a backward) adds to the peak of a fresh process."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import bench_cpu, torch
torch.set_num_threads({torch.get_num_threads()})
if {length!r}:
    B, H, _, D = bench_cpu.SHAPES[{shape!r}]
    bench_cpu.SHAPES[{shape!r}] = (B, H, {length!r}, D)
p = bench_cpu.Problem({shape!r}, {dtype!r}, {case!r})
run = p.implementation({name!r})
small = [t[:, :, :128].contiguous() for t in p.tensors]
if {name!r} == "torch_flex":
    run(*p.tensors)  # compiling takes memory of its own; what is measured below is the growth of a second call
else:
    torch.nn.functional.scaled_dot_product_attention(*small)
before = bench_cpu.reset_peak()
if {name!r} == "torch_flex":
    run(*p.tensors)
else:
    leaves = [t.requires_grad_() for t in p.tensors]
    torch.autograd.grad(run(*leaves).float().sum(), leaves)
print(bench_cpu.peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(run.stdout.split()[-1]) / 1024


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def report(records: list[Record], memory: dict[str, dict[str, float]]) -> str:
    """The table, in Markdown: milliseconds, and ratios above 1 where flexattn is faster."""
    cell = {(r.shape, r.dtype, r.case, r.direction, r.implementation): r.ms for r in records}
    lines = [
        "| shape | dtype | case | fwd ms | flex / ours | SDPA / ours | dense / ours | bwd ms | SDPA / ours | dense / ours |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rivals: dict[tuple[str, str], list[float]] = {}
    for shape, dtype, case in dict.fromkeys((r.shape, r.dtype, r.case) for r in records):
        row = [shape, dtype, case]
        for direction, names in (("forward", IMPLEMENTATIONS[1:]), ("backward", IMPLEMENTATIONS[2:])):
            ours = cell[shape, dtype, case, direction, "flexattn"]
            row.append(f"{ours:.1f}")
            for name in names:
                ratio = cell[shape, dtype, case, direction, name] / ours
                rivals.setdefault((direction, name), []).append(ratio)
                row.append(f"{ratio:.2f}")
        lines.append("| " + " | ".join(row) + " |")
    lines.append("")
    for (direction, name), ratios in rivals.items():
        lines.append(
            f"{direction}, {name} / flexattn: geometric mean {geometric_mean(ratios):.2f}, "
            f"least {min(ratios):.2f}, largest {max(ratios):.2f}"
        )
    lines += ["", "Peak extra memory of forward and backward (torch_flex: forward), MiB:", ""]
    for title, row_of in memory.items():
        lines.append(f"- {title}: " + ", ".join(f"{name} {mib:.0f}" for name, mib in row_of.items()))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="float32, the first shape, two rounds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=CASES, choices=CASES)
    parser.add_argument("--json", type=Path, help="also write the records here")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    shapes = list(SHAPES)[:1] if arguments.quick else list(SHAPES)
    dtypes = ["float32"] if arguments.quick else list(DTYPES)
    rounds = 2 if arguments.quick else arguments.rounds
    records: list[Record] = []
    for shape in shapes:
        for dtype in dtypes:
            for case in arguments.cases:
                print(f"{shape} {dtype} {case} ...", file=sys.stderr, flush=True)
                records += measure(shape, dtype, case, rounds)
    memory: dict[str, dict[str, float]] = {}
    if not arguments.quick:
        for case in ("causal", "sliding_window"):
            title = f"{shapes[0]} float32 {case}"
            print(f"memory {title} ...", file=sys.stderr, flush=True)
            memory[title] = {n: extra_memory(shapes[0], "float32", case, n) for n in IMPLEMENTATIONS}
        memory["flexattn, causal, H8 D64, by length"] = {
            f"S={n}": extra_memory(shapes[0], "float32", "causal", "flexattn", n) for n in (2048, 4096, 8192, 16384)
        }
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "flexattn": flexattn.__version__,
        "python": platform.python_version(),
    }
    print(", ".join(f"{k} {v}" for k, v in machine.items()), end="\n\n")
    print(report(records, memory))
    if arguments.json:
        content: dict[str, Any] = {"machine": machine, "records": [asdict(r) for r in records], "memory_mib": memory}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
