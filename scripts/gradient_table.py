"""What the backward kernels do for captured tensors, read from machine code for a GPU that need not be there.

python scripts/gradient_table.py [--json] [--head-dim D] [target]        default: sm_90

One row for each pattern of `flexattn.codegen.access` and kernel: how the gradient is collected, and the instructions of the
inner loops, those with a matrix product: atomics, stores, shuffles, shared memory, exponentials, all of them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from flexattn import masks
from flexattn.backends.launch import choose
from flexattn.backends.resources import instructions
from flexattn.backends.survey import calls
from flexattn.backends.target import compiling_for, named
from flexattn.codegen.access import usual_methods
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace

HEADS, LENGTH = 8, 4096
COUNTED = {
    "matrix": r"HGMMA|HMMA|UTCHMMA",
    "atomics": r"RED|REDG|ATOM|ATOMG|UTMAREDG",
    "stores": r"STG",
    "shuffles": r"SHFL",
    "staged": r"LDS|LDSM|STS|STSM",
    "exponentials": r"MUFU",
    "all": r"\w+",
}


def learned() -> dict[str, Callable[..., Any]]:
    """Name to score_mod: one for each access pattern, and two that users know by name."""

    def parameter(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, requires_grad=True)

    gain, slopes, gates = parameter(), parameter(HEADS), parameter(1, HEADS, LENGTH)
    relative, buckets, pair = parameter(HEADS, 2 * LENGTH - 1), parameter(32, HEADS), parameter(HEADS, LENGTH, LENGTH)
    experts, group = parameter(16, 16), torch.zeros(LENGTH, dtype=torch.int64)

    def bucket(distance: Any) -> Any:
        far = 16 + torch.log(distance.clamp(min=1) / 16) / 2.0794 * 16
        return torch.where(distance < 16, distance, far.to(torch.int64).clamp(max=31))

    return {
        "0-d": lambda s, b, h, q, kv: s * gain,
        "slopes": lambda s, b, h, q, kv: s + slopes[h] * (kv - q),
        "row gate": lambda s, b, h, q, kv: s * gates[b, h, q],
        "column gate": lambda s, b, h, q, kv: s * gates[b, h, kv],
        "relative": lambda s, b, h, q, kv: s + relative[h, q - kv + LENGTH - 1],
        "T5 buckets": lambda s, b, h, q, kv: s + buckets[bucket((q - kv).clamp(min=0)), h],
        "pair bias": lambda s, b, h, q, kv: s + pair[h, q, kv],
        "indirect": lambda s, b, h, q, kv: s + experts[group[q], group[kv]],
    }


def inner_loops(code: str) -> Iterator[list[str]]:
    """The opcodes of each innermost loop with a matrix product, of disassembled code for NVIDIA GPUs."""
    lines: list[tuple[int, str]] = []
    for line in code.splitlines():
        match = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?(.*?);", line)
        if match:
            lines.append((int(match[1], 16), match[2].strip()))
    loops = []
    for at, text in lines:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    found = []
    for begin, end in loops:
        body = [text.split()[0].split(".")[0] for at, text in lines if begin <= at <= end]
        if any(re.fullmatch(COUNTED["matrix"], op) for op in body):
            found.append((begin, end, body))
    for begin, end, body in found:
        # No loop inside; and no jump back into a loop from behind it, where a wait for a copy goes on that has taken long.
        inside = any((b, e) != (begin, end) and begin <= b and e <= end for b, e, _ in found)
        if not inside and not any(b < begin <= e < end for b, e, _ in found):
            yield body


def rows(target: str, head_dim: int) -> list[dict[str, Any]]:
    """One record for each variant and backward kernel."""
    records = []
    for name, mod in learned().items():
        program, captured, ints = trace(mod, masks.causal_mask)
        parsed = variant(program)
        wanted = [i for i, t in enumerate(captured[: len(parsed.captured)]) if t.requires_grad]
        methods = sorted({m for m in usual_methods(parsed.derivative.loads, wanted) if m})
        with compiling_for(named(target)):
            made = calls(parsed, captured, ints, torch.bfloat16, head_dim, "cpu")
            for call in (c for c in made if c.which in ("dq", "dkdv")):  # the two passes, which collect everything
                chosen = choose(call, named(target))
                counts: Counter[str] = Counter()
                for body in inner_loops(instructions(chosen.kernel)):
                    counts += Counter({k: sum(bool(re.fullmatch(p, op)) for op in body) for k, p in COUNTED.items()})
                record = {"target": target, "D": head_dim, "variant": name, "collected": "+".join(methods)}
                record |= {"kernel": call.kernel.fn.__name__.removeprefix("attention_"), **chosen.resources._asdict()}
                records.append(record | {kind: counts[kind] for kind in COUNTED})
    return records


def table(records: list[dict[str, Any]]) -> str:
    """The records as text."""
    head = [h for h in records[0] if h not in ("target", "D")]
    lines = [head, *([str(record[h]) for h in head] for record in records)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    title = f"{records[0]['target']}, head dimension {records[0]['D']}, bfloat16, causal"
    rows = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join([title, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", nargs="?", default="sm_90", help="NVIDIA GPU: sm_80, sm_90 (default), sm_100")
    parser.add_argument("--head-dim", type=int, default=64, help="columns of query, key and value (default 64)")
    parser.add_argument("--json", action="store_true", help="print records instead of a table")
    arguments = parser.parse_args()
    records = rows(arguments.target, arguments.head_dim)
    print(json.dumps(records) if arguments.json else table(records))


if __name__ == "__main__":
    main()
