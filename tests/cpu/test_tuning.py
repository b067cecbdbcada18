"""What a tuned choice depends on: the facts that it is kept under, and the place in the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexattn import create_block_mask, masks, tuning_cache
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace
from flexattn.kernel_options import check_kernel_options
from flexattn.problem import Problem

pytest.importorskip("triton", reason="needs Triton: Linux")
from flexattn.backends import launch
from flexattn.backends import tuning as tuning_module
from flexattn.backends.launch import Call
from flexattn.backends.triton import Forward, forward_call


def facts(
    mod: Any = None, mask: Any = None, L: int = 300, B: int = 1, dtype: torch.dtype = torch.bfloat16, D: int = 64,
    block_mask: Any = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    found = situation(mod, mask, L, B, dtype, D, block_mask, **options).tuning
    assert found is not None
    return found.facts()


def situation(
    mod: Any = None, mask: Any = None, L: int = 300, B: int = 1, dtype: torch.dtype = torch.bfloat16, D: int = 64,
    block_mask: Any = None, **options: Any,
) -> Call:  # fmt: skip
    program, captured, ints = trace(mod, mask)
    q, k, v = (torch.zeros(B, 4, L, D, dtype=dtype) for _ in range(3))
    lists = [] if block_mask is None else list(block_mask.kv_lists())
    size = (128, 128) if block_mask is None else block_mask.BLOCK_SIZE
    problem = Problem(q, k, v, captured, lists, ints, size, variant(program), 0.1)
    row = torch.zeros(B, 4, L)
    return forward_call(problem, Forward(q, row, row), {"AUTOTUNE": True, **options})


def window(width: int, length: int = 4096) -> Any:
    return create_block_mask(masks.sliding_window(width), None, None, length, length, device="cpu")


def test_a_choice_depends_on_the_program_the_shapes_the_block_mask_and_the_pins() -> None:
    def softcap(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return 20 * torch.tanh(score / 20)

    def relative(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + (q_idx - kv_idx)

    causal = create_block_mask(masks.causal_mask, None, None, 4096, 4096, device="cpu")
    small = create_block_mask(masks.causal_mask, None, None, 4096, 4096, device="cpu", BLOCK_SIZE=64)
    different = [
        facts(),
        facts(softcap),
        facts(relative),
        facts(None, masks.causal_mask),
        facts(L=513),
        facts(B=2),
        facts(D=128),
        facts(dtype=torch.float16),
        facts(BLOCK_M=64),
        facts(num_warps=8),
        facts(None, masks.causal_mask, 4096, block_mask=causal),
        facts(None, masks.causal_mask, 4096, block_mask=small),
        facts(None, masks.causal_mask, 4096, block_mask=window(128)),
        facts(None, masks.causal_mask, 4096, block_mask=window(1024)),
    ]
    assert len({tuning_cache.digest(f) for f in different}) == len(different)
    same = [facts(L=300), facts(L=257), facts(L=512), facts(lambda score, b, h, q, kv: score)]
    assert len({tuning_cache.digest(f) for f in same}) == 1


def test_the_density_of_a_block_mask_is_in_classes() -> None:
    causal = create_block_mask(masks.causal_mask, None, None, 4096, 4096, device="cpu")
    assert facts(L=4096, block_mask=causal)["blocks"] == {"attended": "1/2", "partial": "1/16"}
    assert facts(L=4096, block_mask=window(128))["blocks"] == {"attended": "1/16", "partial": "1"}
    lists = causal.kv_lists()
    assert tuning_module.density([torch.zeros_like(t) for t in lists], 4096, 128) == {"attended": "0", "partial": "0"}
    assert tuning_module.density([], 4096, 128) is None


def test_a_choice_in_the_process_depends_on_what_the_host_knows_of_the_mask() -> None:
    calls = []
    for length in (300, 500, 8192):
        mask = masks.document_mask(torch.arange(8192) // length)
        block_mask = create_block_mask(mask, None, None, 8192, 8192, device="cpu")
        calls.append(situation(mask=mask, L=8192, block_mask=block_mask))
    near, as_near, far = (launch.place_of(call, None) for call in calls)
    assert near == as_near != far
    assert launch.place_of(situation(L=5000), None) != launch.place_of(situation(L=4000), None)
    assert launch.place_of(situation(L=3000), None) == launch.place_of(situation(L=4000), None)
    assert launch.place_of(situation(AUTOTUNE=False), None) != launch.place_of(situation(), None)


def test_changed_kernels_are_timed_anew(tmp_path: Path) -> None:
    file, beside = tmp_path / "forward.py", tmp_path / "device.py"
    digests = set()
    for text in ("one", "two"):
        file.write_text(text), beside.write_text("")
        tuning_module.sources_digest.cache_clear()
        digests.add(tuning_module.sources_digest((tmp_path, beside)))
    assert len(digests) == 2
    assert tuning_module.templates_digest() == facts()["templates"]


def test_the_option_is_a_bool_with_the_usual_prefixes() -> None:
    assert check_kernel_options({"AUTOTUNE": True, "bwd_AUTOTUNE": False}) == {"AUTOTUNE": True, "bwd_AUTOTUNE": False}
    with pytest.raises(ValueError, match="'AUTOTUNE' is 1; it must be a bool"):
        check_kernel_options({"AUTOTUNE": 1})
    assert situation(fwd_AUTOTUNE=False).tuning is None
    assert situation(AUTOTUNE=False, fwd_AUTOTUNE=True).tuning is not None


def test_tiles_in_pieces_have_choices_of_their_own() -> None:
    assert facts(D=80) != facts(D=80, PIECES=False)
    assert situation(D=80).key != situation(D=80, PIECES=False).key
