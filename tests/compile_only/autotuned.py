"""Tune the kernels through Triton's real compiler and launcher on a fake libcuda, with times made of the configuration.

Run in a process of its own by test_launch.py: prints what was chosen and kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import triton
from launches import FakeDevice

from flexattn import create_block_mask, masks, tuning_cache
from flexattn.backends import autotune, launch
from flexattn.backends.launch import Call
from flexattn.backends.triton import backward, forward
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace
from flexattn.problem import Problem


def main() -> None:
    triton.runtime.driver.set_active(FakeDevice())
    launched: list[dict[str, Any]] = []
    run = launch.run

    def noted(call: Call, config: Any) -> None:
        launched.append({"pass": call.which, "tuned": call.tuning is not None, **config._asdict()})
        run(call, config)

    def timer(once: Callable[[], None]) -> float:
        """As if fewer warps and more stages were fast."""
        once()
        config = launched[-1]
        return float(config["num_warps"]) / config["num_stages"]

    launch.run = autotune.run = noted
    autotune.event_timer = lambda device: timer
    q = torch.randn(2, 4, 300, 64, dtype=torch.bfloat16)
    table = torch.rand(9)
    mask = create_block_mask(masks.causal_mask, None, None, 300, 300, device="cpu")
    program, captured, ints = trace(lambda s, b, h, q_idx, kv_idx: s + table[q_idx * kv_idx % 9], masks.causal_mask)
    problem = Problem(q, q, q, captured, list(mask.kv_lists()), ints, (128, 128), variant(program), 0.1)
    # Few are left to compile: the pipeline's depth in the forward, the warps in the backward.
    options = {name: 64 for name in ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")}
    options |= {"AUTOTUNE": True, "fwd_num_warps": 4, "bwd_num_stages": 1, "USE_TMA": False, "OVERLAP": False}
    for _ in range(2):
        out, lse, _ = forward(problem, options)
        backward(problem, out, lse, out, None, [0], options)
        print(json.dumps({"runs": launched}))
        launched.clear()
    for entry in tuning_cache.entries():
        print(json.dumps(entry._asdict()))


if __name__ == "__main__":
    main()
