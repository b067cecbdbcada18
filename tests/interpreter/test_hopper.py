"""The warp-specialised kernel computes what the reference computes, whichever warps are fast; planted bugs are found."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from assertions import EPSILON, assert_within
from gluon_emulator import emulate
from gluon_machine import Hazard
from hypothesis import given, settings
from strategies import Mod, environment, mask_mods, score_mods

from flexattn import flex_attention, masks, mods, reference
from flexattn.backends.hopper import NEEDS, obstacle, specialised
from flexattn.backends.launch import launch
from flexattn.backends.target import named
from flexattn.backends.triton import Forward, forward_call
from flexattn.capture import block_lists
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace
from flexattn.config import KernelConfig, Pinned
from flexattn.problem import Problem
from flexattn.templates import hopper_forward
from flexattn.testing.budget import Seeds, budgets
from flexattn.testing.wide import widened

SCALE = 0.3
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
DOCUMENTS = (torch.arange(500) % 130 < 1).cumsum(0)


def problem(
    score: Any = None, mask: Any = None, B: int = 1, H: int = 2, kv_heads: int = 1, L: int = 200, S: int = 300, E: int = 64,
    Ev: int = 64, block: tuple[int, int] = (128, 128), shared_keys: bool = False, dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Problem:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    kv = (1 if shared_keys else B, kv_heads, S)
    q, k, v = (torch.randn(*s, generator=g).to(dtype) for s in ((B, H, L, E), (*kv, E), (*kv, Ev)))
    program, captured, ints = trace(score, mask)
    lists = [] if mask is None else list(block_lists(mask, (B, H, L, S), block, q)[:4])
    return Problem(q, k, v, captured, lists, ints, block, variant(program), SCALE)


def empty(p: Problem) -> Forward:
    """Results of which nothing is written yet."""
    rows = p.query.shape[:3]
    out = torch.full((*rows, p.value.shape[-1]), math.nan, dtype=p.query.dtype)
    return Forward(out, torch.full(rows, math.nan), torch.full(rows, math.nan))


def run(
    p: Problem,
    seed: int = 0,
    keys: int = 64,
    stages: int = 2,
    kernel: Any = None,
    options: dict[str, Any] | None = None,
) -> Forward:
    result = empty(p)
    call = specialised(forward_call(p, result, options or {}), p)
    shaped = call.shaped(KernelConfig(128, keys, 4, stages))
    programs = shaped.pop("grid")
    emulate(kernel or call.kernel, programs, {**call.arguments, **shaped}, seed)
    return result


def exact_results(p: Problem) -> Forward:
    wide = p._replace(query=p.query.double(), key=p.key.double(), value=p.value.double())
    return Forward(*reference.attention(wide, None))


def condition_of(exact: Forward) -> float:
    """The largest score: an error eps * |score| of it is a relative error of a weight."""
    top = exact.max_scores[torch.isfinite(exact.max_scores)]
    return 1 + (top.abs().max().item() if top.numel() else 0.0)


def assert_right(p: Problem, found: Forward) -> None:
    """Weights and outputs are rounded once each to the operands' precision, all else to float32."""
    exact = exact_results(p)
    single = 16 * condition_of(exact) * EPSILON[torch.float32]
    largest = p.value.abs().max().item()
    budgets = Forward((EPSILON[p.query.dtype] + single) * largest, single, single)
    for name, a, e, budget in zip(Forward._fields, found, exact, budgets, strict=True):
        finite = torch.isfinite(e)
        assert torch.equal(a[~finite].double(), e[~finite]), f"{name}: infinite elsewhere"
        error = (a - e)[finite].abs().max().item() if finite.any() else 0.0
        assert error <= budget, f"{name}: error {error:.3e} where {budget:.3e} is allowed"


def assert_lawful(p: Problem, found: Forward) -> None:
    """Every element is within its budget: for mods that jump where a score is rounded."""
    wide = widened(p)
    exact = {name: t.detach() for name, t in reference.attention(wide.problem)._asdict().items()}
    plain = reference.attention(p, p.query.dtype)._asdict()
    zero = torch.zeros_like(exact["out"]), torch.zeros_like(exact["lse"])
    allowed = budgets(p, wide, exact, plain, Seeds(*zero, *zero)).allowed
    for name, value in found._asdict().items():
        assert_within(name, value, exact[name], allowed[name])


VARIANTS: dict[str, dict[str, Any]] = {
    "noop": {},
    "noop with whole tiles alone": {"L": 256, "S": 256},
    "one key": {"S": 1},
    "one query": {"L": 1, "mask": masks.causal(299)},
    "causal": {"mask": masks.causal_mask, "L": 300},
    "causal in large blocks": {"mask": masks.causal_mask, "L": 500, "S": 500, "block": (256, 128)},
    "causal in small blocks": {"mask": masks.causal_mask, "L": 300, "block": (128, 64)},
    "window": {"mask": masks.sliding_window(70), "L": 400, "S": 400, "H": 1},
    "alibi": {"score": mods.alibi(SLOPES), "mask": masks.causal_mask, "H": 4, "kv_heads": 2},
    "softcap": {"score": mods.softcap(2.0), "B": 2},
    "documents": {"mask": masks.and_masks(masks.document_mask(DOCUMENTS), masks.causal_mask), "L": 500, "S": 500},
    "rows that attend to nothing": {"mask": lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx + 130) & (q_idx % 3 > 0)},
    "programs that attend to nothing": {"mask": lambda b, h, q_idx, kv_idx: q_idx > kv_idx + 140, "L": 300},
    "heads that differ": {"mask": lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) | (h == 1), "H": 4, "kv_heads": 2},
    "keys that batch entries share": {
        "mask": lambda b, h, q_idx, kv_idx: kv_idx < 90 + 100 * b,
        "B": 2,
        "shared_keys": True,
    },
    "128 columns": {"mask": masks.causal_mask, "E": 128, "Ev": 128, "dtype": torch.float16},
    "64 and 128 columns": {"mask": masks.causal_mask, "E": 64, "Ev": 128},
    "a score of -inf": {"score": lambda score, b, h, q_idx, kv_idx: torch.where(kv_idx < 130, score, -math.inf)},
    "a number for a score": {"score": lambda score, b, h, q_idx, kv_idx: torch.zeros_like(score)},
}


@pytest.mark.parametrize("keys", [64, 128])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_right_whoever_is_fast(name: str, keys: int) -> None:
    p = problem(**VARIANTS[name])
    for seed in range(4):
        assert_right(p, run(p, seed, keys, stages=2 + seed % 3))


def test_many_orders_give_the_same_bits() -> None:
    p = problem(mask=masks.causal_mask, H=1, L=128, S=128 + 512)
    p = p._replace(block_mask=list(block_lists(masks.sliding_window(1000), (1, 1, 128, 640), (128, 128), p.query)[:4]))
    first = run(p)
    for seed in range(1, 40):
        for a, b in zip(first, run(p, seed, stages=2 + seed % 3), strict=True):
            assert torch.equal(a, b), seed


@settings(max_examples=25)
@given(
    mod=st.one_of(st.none(), score_mods()),
    mask=st.one_of(st.none(), mask_mods()),
    heads=st.sampled_from([(1, 1), (4, 2), (2, 1)]),
    sizes=st.tuples(st.integers(1, 160), st.integers(1, 160)),
    tile=st.tuples(st.sampled_from([64, 128]), st.integers(2, 4)),
    seed=st.integers(0, 1000),
)
def test_law_7_the_kernel_equals_the_reference(
    mod: Mod | None, mask: Mod | None, heads: tuple[int, int], sizes: tuple[int, int], tile: tuple[int, int], seed: int
) -> None:
    env = environment()
    f, m = (None if x is None else x.bind(env) for x in (mod, mask))
    p = problem(f, m, B=2, H=heads[0], kv_heads=heads[1], L=sizes[0], S=sizes[1], dtype=torch.float16, seed=seed)
    assert_lawful(p, run(p, seed, *tile))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_goes_where_it_goes_in_the_ordinary_kernel(value: float) -> None:
    where = lambda score, b, h, q_idx, kv_idx: torch.where((q_idx % 5 == 1) & (kv_idx == 70), value, score)
    p = problem(where, masks.causal_mask, L=140)
    ordinary = empty(p)
    launch(forward_call(p, ordinary, {}))
    for ours, theirs in zip(run(p), ordinary, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2, equal_nan=True)


def test_adjacent_blocks_are_counted_not_read() -> None:
    p = problem(mask=masks.sliding_window(1000), L=128, S=640)
    call = specialised(forward_call(p, empty(p), {"BLOCKS_ARE_CONTIGUOUS": True}), p)
    assert call.shaped(KernelConfig(128, 64, 4, 2))["shape"].CONTIGUOUS
    assert_right(p, run(p, options={"BLOCKS_ARE_CONTIGUOUS": True}))
    p.block_mask[3][..., 1:] = 10**6  # never read
    assert_right(p, run(p, options={"BLOCKS_ARE_CONTIGUOUS": True}))


# Each is a bug of the kind that shows on a device now and then.
BUGS = {
    "keys are read before they arrive": ("mbarrier.wait(ring.ready.index(j % STAGES), j // STAGES % 2)", "pass"),
    "the first values are read before they arrive": ("        _await(v_ring, 0, STAGES)\n", ""),
    "values are read before they arrive": ("    _await(v_ring, j, STAGES)\n", ""),
    "the queries are read before they arrive": ("mbarrier.wait(q_ready.index(c), 0)", "pass"),
    "a stage is overwritten while it is read": (
        "mbarrier.wait(ring.free.index(stage), (j // STAGES + 1) % 2)  # passes for a stage that was never used",
        "pass",
    ),
    "the producer waits for the wrong parity": ("(j // STAGES + 1) % 2)", "j // STAGES % 2)"),
    "a consumer waits for the wrong parity": ("mbarrier.wait(ring.ready.index(j % STAGES), j // STAGES % 2)",
                                              "mbarrier.wait(ring.ready.index(j % STAGES), (j // STAGES + 1) % 2)"),
    "the parity of a stage never changes": ("mbarrier.wait(ring.ready.index(j % STAGES), j // STAGES % 2)",
                                            "mbarrier.wait(ring.ready.index(j % STAGES), 0)"),
    "keys are released before the product has read them": (
        "    qk = warpgroup_mma_wait(1, deps=[qk])\n    _release(k_ring, j, STAGES)\n",
        "    _release(k_ring, j, STAGES)\n    qk = warpgroup_mma_wait(1, deps=[qk])\n",
    ),
    "values are released before the product has read them": (
        "    acc = warpgroup_mma_wait(0, deps=[acc])\n    _release(v_ring, j - 1, STAGES)\n",
        "    _release(v_ring, j - 1, STAGES)\n    acc = warpgroup_mma_wait(0, deps=[acc])\n",
    ),
    "values of the tile after are released": ("_release(v_ring, j - 1, STAGES)", "_release(v_ring, j, STAGES)"),
    "values are never released": ("    _release(v_ring, j - 1, STAGES)\n", ""),
    "scores are read too early": ("qk = warpgroup_mma_wait(1, deps=[qk])", "qk = warpgroup_mma_wait(2, deps=[qk])"),
    "the output is read too early": ("acc = warpgroup_mma_wait(0, deps=[acc])", "acc = warpgroup_mma_wait(1, deps=[acc])"),
    "one consumer frees a stage for both": ("_barriers(STAGES, CONSUMERS)", "_barriers(STAGES, 1)"),
    "a stage waits for an arrival too many": ("_barriers(STAGES, CONSUMERS)", "_barriers(STAGES, 3)"),
    "a copy is thought to be half as long": (
        "mbarrier.expect(ready, matrix.block_type.nbytes)", "mbarrier.expect(ready, matrix.block_type.nbytes // 2)",
    ),
    "both consumers have the first rows": ("start_m + c * ROWS, 0]", "start_m, 0]"),
    "values are those of the next tile": ("_copy(v, v_ring, j - 1, kv_b, kv_h, previous, STAGES)",
                                          "_copy(v, v_ring, j - 1, kv_b, kv_h, start_n, STAGES)"),
    "the last values are forgotten": (
        "        acc = warpgroup_mma_wait(0, deps=[_issue_values(p, v_ring, n - 1, acc, STAGES)])\n", "",
    ),
}  # fmt: skip


def with_bug(folder: Path, right: str, wrong: str) -> ModuleType:
    """The kernel's module with a piece of it replaced."""
    source = Path(hopper_forward.__file__).read_text()
    assert right in source
    path = folder / "hopper_forward_with_bug.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("flexattn.templates.hopper_forward_with_bug", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bug", BUGS)
def test_the_emulator_finds(bug: str, tmp_path: Path) -> None:
    kernel = with_bug(tmp_path, *BUGS[bug]).attention_forward_hopper
    p = problem(mask=masks.causal(512), H=1, L=128, S=640)
    found = []
    for seed in range(12):
        try:
            assert_right(p, run(p, seed, kernel=kernel))
        except (Hazard, AssertionError) as error:
            found.append(error)
    assert found


def test_the_emulator_finds_that_a_ring_needs_two_stages() -> None:
    with pytest.raises(Hazard, match="deadlock"):
        run(problem(), stages=1)


def test_the_kernel_without_a_bug_passes_where_bugs_are_looked_for(tmp_path: Path) -> None:
    kernel = with_bug(tmp_path, "def _produce(", "def _produce(").attention_forward_hopper
    p = problem(mask=masks.causal(512), H=1, L=128, S=640)
    for seed in range(12):
        assert_right(p, run(p, seed, kernel=kernel))


OBSTACLES: dict[str, tuple[Problem, str]] = {
    "dtype": (problem(dtype=torch.float32), "convert them to torch.bfloat16"),
    "head dimension": (problem(E=80), "head dimensions are 80 and 64; it has tiles for 64 and 128"),
    "no keys": (problem(S=0), "there are no keys"),
    "block size": (problem(mask=masks.causal_mask, block=(64, 64)), "BLOCK_SIZE is (64, 64); make the block mask with"),
    "expanded": (problem()._replace(key=torch.zeros(1, 1, 300, 64).bfloat16().expand(1, 2, -1, -1)), "key is expanded"),
    "unaligned": (
        problem()._replace(value=torch.zeros(1, 1, 300, 65).bfloat16()[..., 1:]),
        "value is expanded, or its rows",
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_an_obstacle_is_named_with_a_way_round_it(name: str) -> None:
    p, message = OBSTACLES[name]
    assert message in obstacle(p, named("sm_90"), Pinned())
    assert len(OBSTACLES) > len(NEEDS)


def test_other_devices_and_other_tiles_are_refused_and_the_rest_is_not() -> None:
    p = problem()
    assert obstacle(p, named("sm_90"), Pinned()) == ""
    assert obstacle(p, named("sm_90"), Pinned(BLOCK_M=128, BLOCK_N=64, num_warps=4, num_stages=5)) == ""
    assert "this is cuda 100" in obstacle(p, named("sm_100"), Pinned())
    assert "leave BLOCK_M out or write 128" in obstacle(p, named("sm_90"), Pinned(BLOCK_M=64))
    assert "num_stages is 1; leave num_stages out or write 2" in obstacle(p, named("sm_90"), Pinned(num_stages=1))
    assert "leave BLOCK_N out or write 64 or 128" in obstacle(p, named("sm_90"), Pinned(BLOCK_N=32))


def test_the_option_is_an_error_where_the_kernel_cannot_run() -> None:
    q = torch.randn(1, 1, 32, 64)
    for name in ("WARP_SPECIALIZED", "fwd_WARP_SPECIALIZED"):
        with pytest.raises(
            ValueError, match=r"capability 9\.0, and this is Triton's interpreter; or leave the option out"
        ):
            flex_attention(q, q, q, backend="triton", kernel_options={name: True})
    with pytest.raises(ValueError, match="only the forward has such a kernel; write 'WARP_SPECIALIZED'"):
        flex_attention(q, q, q, backend="triton", kernel_options={"bwd_WARP_SPECIALIZED": True})
    plain = flex_attention(q, q, q, backend="triton", kernel_options={"WARP_SPECIALIZED": False})
    assert torch.equal(plain, flex_attention(q, q, q, backend="triton"))
