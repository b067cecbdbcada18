"""Building block masks: ours beside torch's `create_block_mask`, eager and, with a GPU, compiled. One run, one table.

Every mask is first compared block by block with torch's. Cold is the first call of a fresh process, tracing and
one-time set-up included, imports not; warm the median of later calls, contenders taking turns in one process, each with
a new mask function over new tensors of the same values. Memory is the growth of the peak resident size of the fresh
process (on a GPU, of the peak of allocated memory) over the first call.

    python benchmarks/bench_block_mask.py                 # about ten minutes on two cores
    python benchmarks/bench_block_mask.py --quick         # S = 8192 beside torch, 131072 alone
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
from torch import Tensor
from torch.nn.attention import flex_attention as peer

import flexattn
from flexattn.block_lists import dense

MaskMod = Callable[..., Tensor]
BATCH = 2  # of the mask with a prefix for each batch entry
COMMON = ("causal", "sliding_window", "documents", "documents_renamed", "prefix_lm", "chunked", "natten_2d")
OTHERS = ("transfusion", "global_tokens", "random_matrix", "documents_interleaved")
LONG = (*COMMON, "transfusion", "global_tokens", "window_and_documents")
LARGEST_MATRIX = 16384


@dataclass
class Record:
    """One measured cell. Times in ms, memory in MiB."""

    case: str
    S: int
    implementation: str
    cold: float
    warm: float
    memory: float


def document_ids(S: int, device: str) -> Tensor:
    """Documents of uneven lengths, about 1,000 tokens, one after the other."""
    g = torch.Generator().manual_seed(0)
    cuts = torch.randperm(S - 1, generator=g)[: S // 1000].sort().values + 1
    return torch.bucketize(torch.arange(S), cuts, right=True).to(device)


def make(case: str, S: int, device: str) -> tuple[MaskMod, int | None]:
    """A mask function over fresh tensors, plain code that either library takes, and its batch size."""
    g = torch.Generator().manual_seed(1)
    if case == "causal":
        return lambda b, h, q, k: q >= k, None
    if case == "sliding_window":
        return lambda b, h, q, k: (q >= k) & (q - k < 1024), None
    if case == "chunked":
        return lambda b, h, q, k: (q // 2048 == k // 2048) & (q >= k), None
    if case == "prefix_lm":
        prefix = torch.tensor([S // 10, S // 3], device=device)
        return lambda b, h, q, k: (k < prefix[b]) | (q >= k), BATCH
    if case == "natten_2d":
        width = 2 ** (int(math.log2(S)) // 2)
        height = S // width

        def natten(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            y, x = (q // width).clamp(6, height - 7), (q % width).clamp(6, width - 7)
            return ((y - k // width).abs() <= 6) & ((x - k % width).abs() <= 6)

        return natten, None
    if case == "transfusion":
        place = torch.arange(S, device=device)
        spans = torch.where(place % 1000 < 256, place // 1000, -1)
        return lambda b, h, q, k: (q >= k) | ((spans[q] == spans[k]) & (spans[q] >= 0)), None
    if case == "global_tokens":
        return lambda b, h, q, k: ((q - k).abs() <= 256) | (q < 32) | (k < 32), None
    if case == "random_matrix":
        matrix = (torch.rand(S, S, generator=g) > 0.5).to(device)
        return lambda b, h, q, k: matrix[q, k], None
    ids = document_ids(S, device)
    if case == "documents_renamed":
        ids = torch.randperm(int(ids.max()) + 1, generator=g).to(device)[ids]
    if case == "documents_interleaved":
        ids = ids[torch.randperm(S, generator=g).to(device)]
    if case == "window_and_documents":
        return lambda b, h, q, k: (q >= k) & (q - k < 4096) & (ids[q] == ids[k]), None
    return lambda b, h, q, k: ids[q] == ids[k], None


def builder(implementation: str, S: int, device: str) -> Callable[[MaskMod, int | None], Any]:
    """What builds a mask of S x S."""
    if implementation == "flexattn":
        return lambda mod, B: flexattn.create_block_mask(mod, B, None, S, S, device)
    create = peer.create_block_mask
    if implementation == "torch_compiled":
        create = torch.compile(create)
    return lambda mod, B: create(mod, B, None, S, S, device=device)


def timed(build: Callable[[MaskMod, int | None], Any], case: str, S: int, device: str) -> float:
    """Milliseconds of one mask, its function and tensors made before."""
    mod, B = make(case, S, device)
    wait(device)
    start = time.perf_counter()
    build(mod, B)
    wait(device)
    return (time.perf_counter() - start) * 1e3


def wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def check(case: str, S: int, device: str) -> None:
    """Raise unless both libraries list the same blocks, partial and full."""
    mod, B = make(case, S, device)
    ours, theirs = (builder(name, S, device)(mod, B) for name in ("flexattn", "torch"))
    columns = math.ceil(S / 128)
    for kind in ("kv", "full_kv"):
        lists = [
            dense(getattr(m, f"{kind}_num_blocks"), getattr(m, f"{kind}_indices"), columns) for m in (ours, theirs)
        ]
        if not torch.equal(*torch.broadcast_tensors(*lists)):
            raise SystemExit(f"{case}, S = {S}: {kind} blocks differ from torch's")


def peak() -> int:
    """The peak resident size of this process, in KiB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def first_call(case: str, S: int, implementation: str, device: str) -> dict[str, float]:
    """In a fresh process: time and growth of memory of the first mask."""
    build = builder(implementation, S, device)
    mod, B = make(case, S, device)
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
    else:
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
    wait(device)
    start = time.perf_counter()
    build(mod, B)
    wait(device)
    cold = (time.perf_counter() - start) * 1e3
    grown = (peak() - before) / 1024 if device == "cpu" else (torch.accelerator.max_memory_allocated() - before) / 2**20
    return {"cold": cold, "memory": grown}


def later_calls(case: str, S: int, implementations: list[str], device: str) -> dict[str, float]:
    """In one process, in turns: the median time of masks after the first."""
    if len(implementations) > 1:
        check(case, S, device)
    builders = {name: builder(name, S, device) for name in implementations}
    times: dict[str, list[float]] = {name: [timed(b, case, S, device)][:0] for name, b in builders.items()}
    for _ in range(3):
        for name, build in builders.items():
            times[name] += [timed(build, case, S, device) for _ in range(3 if name == "flexattn" else 1)]
    return {name: statistics.median(found) for name, found in times.items()}


def measure(case: str, S: int, implementations: list[str], device: str) -> list[Record]:
    """All cells of one mask and length."""

    def fresh(*arguments: str) -> dict[str, float]:
        command = [sys.executable, __file__, "--device", device, "--cell", case, str(S), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if done.returncode:
            raise SystemExit(f"{case}, S = {S}:\n{done.stderr}")
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    warm = fresh("warm", *implementations)
    records = []
    for name in implementations:
        first = fresh("cold", name)
        records.append(Record(case, S, name, first["cold"], warm[name], first["memory"]))
    return records


def table(records: list[Record]) -> str:
    """Markdown: ours in ms and MiB, rivals as ratios to ours."""
    lines = ["| mask | S | cold ms | warm ms | MiB |", "|---|---|---|---|---|"]
    rivals = [n for n in ("torch", "torch_compiled") if any(r.implementation == n for r in records)]
    for rival in rivals:
        name = "torch" if rival == "torch" else "compiled torch"
        lines[0] += f" {name} warm ms | cold, {name} / ours | warm, {name} / ours | memory, {name} / ours |"
        lines[1] += "---|---|---|---|"
    for r in (r for r in records if r.implementation == "flexattn"):
        line = f"| {r.case} | {r.S:,} | {r.cold:.1f} | {r.warm:.2f} | {r.memory:.0f} |"
        for rival in rivals:
            other = next((o for o in records if (o.case, o.S, o.implementation) == (r.case, r.S, rival)), None)
            if other is None:
                line += " | | | |"
            else:
                memory = f"{other.memory / r.memory:.0f}" if r.memory >= 1 else f"> {other.memory:.0f}"
                line += f" {other.warm:.1f} | {other.cold / r.cold:.1f} | {other.warm / r.warm:.1f} | {memory} |"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and, with --out, write it and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one length beside torch, one alone")
    parser.add_argument("--beside", type=int, nargs="*", help="lengths beside torch (default: 8192 16384)")
    parser.add_argument("--alone", type=int, nargs="*", help="lengths without it (default: 131072 1048576)")
    parser.add_argument("--smoke", action="store_true", help="two masks of 1024, to see that it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write PATH.json and PATH.md")
    parser.add_argument("--cell", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        case, S, what, *names = options.cell
        found = (
            first_call(case, int(S), names[0], options.device)
            if what == "cold"
            else later_calls(case, int(S), names, options.device)
        )
        print(json.dumps(found))
        return
    device = options.device
    machine = {
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "flexattn": flexattn.__version__,
        "python": platform.python_version(),
    }
    beside = ["flexattn", "torch"] + (["torch_compiled"] if device == "cuda" else [])
    short = options.beside if options.beside is not None else [8192] if options.quick else [8192, 16384]
    long = options.alone if options.alone is not None else [131072] if options.quick else [131072, 1048576]
    cells = [(c, S, beside) for S in short for c in (*COMMON, *OTHERS)]
    cells += [(c, S, ["flexattn"]) for S in long for c in LONG]
    if options.smoke:
        cells = [(c, 1024, beside) for c in ("natten_2d", "documents_renamed")]
    records: list[Record] = []
    for case, S, implementations in cells:
        print(f"{case}, S = {S}", file=sys.stderr, flush=True)
        records += measure(case, S, implementations, device)
    text = ", ".join(f"{k} {v}" for k, v in machine.items()) + "\n\n" + table(records)
    print(text)
    if options.out:
        content = {"machine": machine, "records": [asdict(r) for r in records]}
        options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(
            f"# Building block masks, {time.strftime('%Y-%m-%d')}\n\n`python benchmarks/bench_block_mask.py`; "
            "blocks of 128 x 128, lists compared with torch's first. Ratios above 1 mean that flexattn is faster or "
            f"smaller.\n\n{text}\n"
        )


if __name__ == "__main__":
    main()
