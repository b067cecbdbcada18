"""Host time of calls that launch GPU kernels, measured without a GPU: Triton's own launcher on a library in the place of
libcuda, which does nothing. Tensors are on the CPU, and allocated there; what a real driver adds is not in the numbers.

Processor time of one thread, the least of many rounds, in microseconds a call. "The whole way" is the same call without
plans, see `flexattn/backends/plans.py`.

    python benchmarks/bench_host.py            # a minute; needs a C compiler
    python benchmarks/bench_host.py --quick
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests" / "compile_only"
B, H, S, D = 1, 8, 512, 64


def on_fake_libcuda() -> int:
    """Run this script again in a process whose libcuda does nothing."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-w", "-O2", "-shared", "-fPIC", "-o", library, TESTS / "fake_libcuda.c"], check=True)
        (library.parent / "libcuda.so").symlink_to(library)
        found = {"LD_LIBRARY_PATH": folder, "TRITON_LIBCUDA_PATH": folder, "TRITON_CACHE_DIR": f"{folder}/cache"}
        fixed = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "QUIET": "1", "PYTHONPATH": str(TESTS)}
        return subprocess.run([sys.executable, *sys.argv], env={**os.environ, **found, **fixed}).returncode


def least(call: Callable[[], object], rounds: int, calls: int = 50) -> float:
    """Microseconds of processor time a call."""
    for _ in range(5):
        call()
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            call()
        best = min(best, (time.process_time() - start) / calls)
    return 1e6 * best


def measure(rounds: int) -> None:
    """Measure and print the table."""
    import torch
    import triton
    from launches import FakeDevice, causal

    import flexattn
    from flexattn import capture, ops, validate
    from flexattn.backends import plans
    from flexattn.codegen.trace_cache import cached_trace
    from flexattn.operands import split

    triton.runtime.driver.set_active(FakeDevice())
    validate.triton_refusal = lambda query, value: ""  # type: ignore[assignment]
    torch.set_num_threads(1)
    plain = [torch.randn(B, H, S, D, dtype=torch.bfloat16) for _ in range(3)]
    learning = [t.clone().requires_grad_() for t in plain]
    gradient = torch.ones_like(plain[0])
    slopes = flexattn.mods.alibi_slopes(H)
    mask = flexattn.create_block_mask(causal, None, None, S, S, "cpu")

    def alibi(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + slopes[h] * (kv_idx - q_idx)

    def times(mod: Any, block: Any) -> dict[str, float]:
        """The parts of a case's calls."""

        def forward(tensors: list[Any]) -> Any:
            return flexattn.flex_attention(*tensors, mod, block, backend="triton")

        def both() -> object:
            return torch.autograd.grad(forward(learning), learning, gradient)

        mask_mod, lists = (None, ()) if block is None else (block.mask_mod, block.kv_lists())
        options = "" if block is None else "BLOCKS_ARE_CONTIGUOUS=True"
        program, inside, ints = cached_trace(mod, mask_mod, device=plain[0].device)
        captured, floats = split(inside, program)
        rest = (ints, floats, (128, 128), program, D**-0.5, "triton", options)
        placed = (mod, mask_mod, lists, (128, 128), D**-0.5, "triton", options)
        tensors = (*plain, *captured, *lists)
        kind = ("forward", len(captured), program, 128, 128, options)
        planned: Any = plans.planned
        parts: dict[str, Callable[[], object]] = {
            "forward": lambda: forward(plain),
            "- from the mods and lists on": lambda: capture.attention(*plain, *placed),
            "- the trace, found again": lambda: cached_trace(mod, mask_mod, device=plain[0].device),
            "- the operator, past the dispatcher": lambda: ops.attention(*plain, captured, lists, *rest),
            "- the operator, as compiled code calls it": lambda: ops.FORWARD(*plain, captured, list(lists), *rest),
            "- the plan": lambda: planned(tensors, kind, (D**-0.5, *floats), None),
            "forward, recorded": lambda: forward(learning),
            "forward and backward": both,
        }
        found = {}
        for name, call in parts.items():
            with torch.set_grad_enabled(name in ("forward, recorded", "forward and backward")):
                found[name] = least(call, rounds)
        with plans.whole_way():
            with torch.no_grad():
                found["forward, the whole way"] = least(parts["forward"], rounds)
            found["forward and backward, the whole way"] = least(both, rounds)
        return found

    columns = {"no mod": times(None, None), "causal": times(None, mask), "ALiBi, causal": times(alibi, mask)}
    print(f"| B={B}, H={H}, S={S}, D={D}, bfloat16 | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name in columns["causal"]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.1f}" for column in columns.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    if "QUIET" not in os.environ:
        raise SystemExit(on_fake_libcuda())
    measure(20 if options.quick else 150)


if __name__ == "__main__":
    main()
