"""Compile the default kernels of four variants for GPUs that need not be there, and print what they use.

python scripts/compile_table.py [--json] [--half] [target ...]        default: sm_80 sm_90 sm_100 gfx942
"""

from __future__ import annotations

import argparse
import json
import re

import torch

from flexattn import masks
from flexattn.backends.resources import instructions
from flexattn.backends.survey import survey
from flexattn.backends.target import named
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
HEAD_DIMS = (64, 128)
# Most capable first: warpgroup (sm_90), tensor memory (sm_100), warp, and AMD's matrix instructions.
MATRIX = {"wgmma": r"\bHGMMA\.", "tcgen05": r"\bUTCHMMA\b", "mma": r"\bHMMA\.", "mfma": r"\bv_mfma_"}


def variants() -> dict[str, tuple]:
    """Name to (score_mod, mask_mod)."""
    slopes = torch.ones(8, requires_grad=True)
    documents = torch.arange(4096) // 512
    same = masks.document_mask(documents)
    return {
        "noop": (None, None),
        "causal": (None, masks.causal_mask),
        "document": (None, masks.and_masks(same, masks.causal_mask)),
        "alibi": (lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx), masks.causal_mask),
    }


def rows(target: str, half: bool = False) -> list[dict]:
    """One record for each variant, head dimension and kernel; by half, each variant has one of the head dimensions."""
    found = []
    for place, head_dim in enumerate(HEAD_DIMS):
        for number, (name, (score_mod, mask_mod)) in enumerate(variants().items()):
            if half and number % len(HEAD_DIMS) != place:
                continue
            program, captured, ints = trace(score_mod, mask_mod)
            for made in survey(
                variant(program), captured, ints, torch.bfloat16, head_dim, named(target), both_ways=True
            ):
                code = instructions(made.kernel)
                matrix = next((kind for kind, pattern in MATRIX.items() if re.search(pattern, code)), "none")
                record = {"target": target, "variant": name, "D": head_dim, "kernel": made.template}
                record["pass"] = made.which
                record |= {"config": made.config, **made.resources._asdict(), "matrix": matrix}
                found.append(record | {"limit": named(target).shared_memory, "seconds": round(made.seconds, 1)})
    return found


def table(records: list[dict]) -> str:
    """The records as text."""
    head = ["target", "D", "variant", "pass", "config", "registers", "spilled", "shared", "matrix", "seconds"]
    lines = [head] + [
        [
            str(r[h]).replace("attention_", "").replace("BLOCK_", "").replace("num_", "").replace(" products", "")
            for h in head
        ]
        for r in records
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=TARGETS)
    parser.add_argument("--json", action="store_true", help="print records instead of a table")
    parser.add_argument("--half", action="store_true", help="each variant with one head dimension only")
    arguments = parser.parse_args()
    records = [record for target in arguments.targets for record in rows(target, arguments.half)]
    print(json.dumps(records) if arguments.json else table(records))


if __name__ == "__main__":
    main()
