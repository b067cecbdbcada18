"""Launch the kernels through Triton's real launcher on a fake libcuda: arguments are packed, nothing runs.

Run in a process of its own by test_launch.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

from flexattn import create_block_mask
from flexattn.backends.triton import backward, forward
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace
from flexattn.problem import Problem


class FakeDevice:
    """What Triton asks of a driver, with the launcher and the loader of the real one."""

    launcher_cls = CudaLauncher

    def __init__(self) -> None:
        self.utils = CudaUtils()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def run(
    name: str, mod: Any, mask: Any, wanted: list[int], lse: bool, dtype: torch.dtype, columns: int = 40, **options: Any
) -> None:  # fmt: skip
    """A forward and a backward; keys shared by the batch, grouped heads, other columns in value."""
    program, captured, ints = trace(mod, mask)
    B, H, L = 2, 4, 300
    q = torch.randn(B, H, L, 64, dtype=dtype)
    k, v = torch.randn(1, 2, L, 64, dtype=dtype), torch.randn(1, 2, L, columns, dtype=dtype)
    lists = [] if mask is None else list(create_block_mask(mask, None, None, L, L).kv_lists())
    problem = Problem(q, k, v, captured, lists, ints, (128, 128), variant(program), 0.1)
    print(f"case {name} {q.data_ptr()}", flush=True)
    out = forward(problem, options)
    gradients = backward(problem, out.out, out.lse, out.out, out.lse if lse else None, wanted, options)
    assert [g.shape for g in gradients[:3]] == [q.shape, k.shape, v.shape]
    assert [g.shape for g in gradients.dcaptured] == [captured[i].shape for i in wanted]


def main() -> None:
    triton.runtime.driver.set_active(FakeDevice())
    slopes, documents, empty = torch.rand(4), torch.arange(300) // 50, torch.zeros(0)
    half, whole = torch.bfloat16, torch.float32
    run("plain", None, None, [], False, half)
    run("float32", None, None, [], True, whole)
    run("listed", None, causal, [], True, half, BLOCKS_ARE_CONTIGUOUS=True, num_warps=4)
    run(
        "learned",
        lambda score, b, h, q_idx, kv_idx: score * 2.5 + slopes[h] * (kv_idx - q_idx) + empty[kv_idx],
        lambda b, h, q_idx, kv_idx: (documents[q_idx] == documents[kv_idx]) & (q_idx >= kv_idx),
        [0, 1],
        False,
        half,
    )
    run("hopper", None, causal, [], False, half, columns=64, WARP_SPECIALIZED=True)
    table, pair, gate = torch.rand(4, 600), torch.rand(300, 300), torch.rand(2, 4, 300)
    run(
        "tiles",
        lambda score, b, h, q_idx, kv_idx: (
            score
            + table[h, kv_idx - q_idx + 299]
            + pair[q_idx, kv_idx]
            + gate[b, h, kv_idx] * pair[documents[q_idx], kv_idx]
        ),
        None,
        [0, 1, 2],
        False,
        half,
    )


if __name__ == "__main__":
    main()
