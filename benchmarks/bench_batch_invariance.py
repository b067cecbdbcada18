"""What batch invariance costs: the time with `batch_invariant=`, divided by that of the same documents and mask without it.

One process; the two take turns, medians. Results are compared before they are timed. A table on stdout.

    python benchmarks/bench_batch_invariance.py            # a minute, on the GPU if there is one, else on one core
    python benchmarks/bench_batch_invariance.py --smoke    # tiny: does the program itself work
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from timing import milliseconds
from torch import Tensor

from flexattn import Documents, flex_attention, masks

HEADS, HEAD_DIM = 8, 64


class Case(NamedTuple):
    """Documents of the given lengths in each row of a batch, with a causal mask."""

    name: str
    lengths: list[int]
    batch: int


def cases(smoke: bool) -> list[Case]:
    """What is timed."""
    if smoke:
        return [Case("3 documents", [20, 70, 9], 1), Case("2 rows of 64", [64], 2)]
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randint(50, 900, (17,), generator=generator).tolist()
    return [
        Case("17 documents of 50 to 900 tokens", mixed, 1),
        Case("a batch of 4, 2,048 tokens each", [2048], 4),
        Case("32 documents of 100 tokens", [100] * 32, 1),
    ]


def ratios(case: Case, device: str, rounds: int) -> tuple[float, float]:
    """Forward, and forward with backward: how many times as long it takes batch invariant."""
    packed = Documents.from_lengths(case.lengths).to(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = case.batch, HEADS, sum(case.lengths), HEAD_DIM
    leaves = [torch.randn(sizes, device=device, dtype=dtype).requires_grad_() for _ in range(3)]
    dout = torch.randn(sizes, device=device, dtype=dtype)
    own = packed.mask(masks.causal_mask)

    def plain() -> Tensor:
        return flex_attention(*leaves, mask_mod=own)

    def invariant() -> Tensor:
        return flex_attention(*leaves, mask_mod=masks.causal_mask, batch_invariant=packed)

    def both(attend: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(), leaves, dout)

    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(invariant(), plain(), rtol=tolerance, atol=tolerance)
    found = []
    for ways in ((plain, invariant), (both(plain), both(invariant))):
        with torch.set_grad_enabled(ways[0] is not plain):
            taken = [[milliseconds(way, device, 1) for way in ways] for _ in range(rounds)]
        found.append(statistics.median(b for _, b in taken) / statistics.median(a for a, _ in taken))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, one round")
    smoke = parser.parse_args().smoke
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"| causal, {HEADS} heads of {HEAD_DIM}, {device} | forward | with backward |\n|---|---|---|")
    for case in cases(smoke):
        forward, backward = ratios(case, device, 1 if smoke else 3)
        print(f"| {case.name} | {forward:.1f} times | {backward:.1f} times |", flush=True)


if __name__ == "__main__":
    main()
