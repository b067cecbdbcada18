"""Kernel options that are pinned are followed, or refused with the reason: none is dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from flexattn import create_block_mask, flex_attention, masks
from flexattn.backends import launch, pins
from flexattn.backends.target import compiling_for, named
from flexattn.backends.triton import Backward, Collection, Forward, dkdv_call, dq_call, forward_call
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace
from flexattn.kernel_options import OPTIONS
from flexattn.problem import Problem

L = 64


def problem(
    E: int = 16, block: tuple[int, int] = (32, 32), mask: Any = masks.causal_mask, **operands: Tensor
) -> Problem:
    """A problem in bfloat16, with a block mask if there is a mask."""
    program, captured, ints = trace(None, mask)
    lists = [] if mask is None else create_block_mask(mask, None, None, L, L, "cpu", BLOCK_SIZE=block).kv_lists()
    q, k, v = (torch.randn(1, 2, L, E).bfloat16() for _ in range(3))
    return Problem(q, k, v, captured, list(lists), ints, block, variant(program), 0.3)._replace(**operands)


def shape_of(p: Problem, which: str, options: Mapping[str, Any], dout: Tensor | None = None) -> Any:
    """What a pass of a problem is compiled for, and the arguments of its call."""
    row = torch.zeros(1, 2, L)
    dout = p.query if dout is None else dout
    gradients, nothing = Backward(p.query, p.key, p.value, []), Collection(p, [])
    call = {
        "forward": lambda: forward_call(p, Forward(p.query, row, row), options),
        "dq": lambda: dq_call(p, dout, row, row, gradients, nothing, options),
        "dkdv": lambda: dkdv_call(p, dout, row, row, gradients, nothing, options),
    }[which]()
    made = call.shaped(launch._interpreted(call.pinned))
    return made["shape"], made


def odd_rows(t: Tensor) -> Tensor:
    return torch.cat([t, t[..., :1]], -1)[..., :-1]


def late(t: Tensor) -> Tensor:
    return torch.cat([t.flatten(), t.flatten()[:8]])[1 : 1 + t.numel()].view_as(t)


DENSE = torch.randn(1, 2, L, 16).bfloat16()
# Options, the problem, and what the refusal says.
REFUSED: dict[str, tuple[dict[str, Any], Problem, str]] = {
    "tile": (
        {"BLOCK_M": 64},
        problem(),
        'BLOCK_M": 64} cannot be followed: the blocks of the mask have 32 queries; write 32',
    ),
    "keys": (
        {"BLOCK_N": 64},
        problem(block=(64, 32)),
        "have 32 keys; write 32, or make the block mask with a BLOCK_SIZE of 64",
    ),
    "tile that covers": ({"BLOCK_M": 64}, problem(block=(20, 16)), "the blocks of the mask have 20 queries; write 32"),
    "rows": ({"USE_TMA": True}, problem(E=20), "query has rows of 20 elements of 2 bytes; make that a multiple of 8"),
    "columns": (
        {"USE_TMA": True},
        problem(key=DENSE.mT.contiguous().mT),
        r"key has rows whose elements are not adjacent",
    ),
    "strides": (
        {"USE_TMA": True},
        problem(value=odd_rows(DENSE)),
        r"value has strides \(2176, 1088, 17, 1\), which are no",
    ),
    "address": (
        {"USE_TMA": True},
        problem(value=late(DENSE)),
        r"value begins at an address .*; pass it through \.clone\(\)",
    ),
    "blocks": (
        {"USE_TMA": True},
        problem(block=(20, 20)),
        r"BLOCK_SIZE is \(20, 20\); make the block mask with multiples of 16",
    ),
    "box": ({"USE_TMA": True, "BLOCK_N": 512}, problem(mask=None), "TMA loads at most 256 rows at once"),
    "prefix": ({"fwd_USE_TMA": True}, problem(E=20), r'\{"fwd_USE_TMA": True\} cannot be followed'),
    "late": ({"OVERLAP": True}, problem(E=20), r'\{"OVERLAP": True\} cannot be followed: query has rows of 20'),
    "pieces": ({"PIECES": True}, problem(E=40), "a head dimension of 40 is padded to 64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_operands_do_not_permit_is_refused_with_the_reason(name: str) -> None:
    options, p, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        shape_of(p, "forward", options)
    assert str(caught.value).endswith("; or leave the option out")
    shape_of(p, "forward", {})


@pytest.mark.parametrize("which", ["dq", "dkdv"])
def test_the_backward_refuses_as_the_forward_does(which: str) -> None:
    suffix = {"dq": "2", "dkdv": "1"}[which]
    for options, p, message in (
        ({"bwd_USE_TMA": True}, problem(E=20), r'\{"bwd_USE_TMA": True\} cannot be followed: query has rows of 20'),
        ({f"BLOCK_M{suffix}": 64}, problem(), f'BLOCK_M{suffix}": 64}} cannot be followed'),
        ({"PIECES": True}, problem(E=40), "padded to 64"),
    ):
        with pytest.raises(ValueError, match=message):
            shape_of(p, which, options)
    # Options of other passes.
    other = {"BLOCK_M": 64, f"BLOCK_N{3 - int(suffix)}": 512, "fwd_USE_TMA": True}
    shape_of(problem(E=20), which, other)


def test_what_the_operands_permit_is_followed() -> None:
    p = problem(E=80, block=(64, 64))
    options = {
        "BLOCK_M": 16,
        "BLOCK_N": 64,
        "BLOCK_M1": 64,
        "BLOCK_N2": 16,
        "OVERLAP": True,
        "UPRIGHT": True,
        "PIECES": True,
    }
    shape, made = shape_of(p, "forward", options)
    assert (shape.BLOCK_M, shape.BLOCK_N, shape.OVERLAP, shape.UPRIGHT) == (16, 64, True, False)
    assert (shape.BLOCK_D, shape.REST_D) == (64, 16)
    assert made["k_tma"] is not None, "values are added late only by TMA"
    shape, made = shape_of(p, "dkdv", options)
    assert (shape.BLOCK_M, shape.UPRIGHT, shape.OVERLAP, made["k_tma"]) == (64, True, False, None)
    shape, made = shape_of(p, "dq", options | {"bwd_USE_TMA": True})
    assert shape.BLOCK_N == 16 and made["do_tma"] is not None
    for E in (16, 64, 72, 192):  # no padding to avoid, or pieces that avoid it
        shape_of(problem(E), "forward", {"PIECES": True})
    shape_of(problem(block=(20, 16)), "forward", {"BLOCK_M": 32, "BLOCK_N": 16})


def test_a_gradient_that_tma_cannot_read_is_copied() -> None:
    """The gradient of a sum is one number for all elements, which no caller has chosen."""
    q, k, v = (torch.randn(1, 2, L, 16, requires_grad=True) for _ in range(3))
    found = []
    for options in ({"USE_TMA": True}, {}):
        out = flex_attention(q, k, v, kernel_options=options, backend="triton")
        found.append(torch.autograd.grad(out.sum(), (q, k, v)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    shape_of(problem(), "dq", {"USE_TMA": True}, dout=DENSE)
    with pytest.raises(ValueError, match="the gradient of the output has rows whose elements are not adjacent"):
        shape_of(problem(), "dq", {"USE_TMA": True}, dout=torch.ones(()).bfloat16().expand(1, 2, L, 16))


def test_queries_as_rows_are_refused_where_gradients_are_summed_by_keys() -> None:
    bias = torch.zeros(L, requires_grad=True)
    q, k, v = (torch.randn(1, 2, L, 16) for _ in range(3))

    def biased(learned: Tensor) -> Tensor:
        mod = lambda score, b, h, q_idx, kv_idx: score + learned[kv_idx]
        return flex_attention(q, k, v.requires_grad_(), mod, kernel_options={"UPRIGHT": True}, backend="triton")

    with pytest.raises(ValueError, match="gradient of a captured tensor that is read by key is summed over queries"):
        biased(bias).sum().backward()
    biased(bias.detach()).sum().backward()


def test_tiles_of_the_dq_pass_make_two_passes() -> None:
    from flexattn.backends.one_pass import in_one_pass_or_two

    hopper = named("sm_90")
    assert in_one_pass_or_two(problem(), (), {}, hopper) == [True]
    assert in_one_pass_or_two(problem(), (), {"BLOCK_M2": 32}, hopper) == [False]
    assert in_one_pass_or_two(problem(), (), {"bwd_BLOCK_N2": 32, "AUTOTUNE": True}, hopper) == [False]
    with pytest.raises(ValueError, match=r'\{"bwd_ONE_PASS": True\} cannot be followed: blocks of 20 queries'):
        in_one_pass_or_two(problem(block=(20, 16)), (), {"bwd_ONE_PASS": True}, hopper)


# Options that a GPU, or another one, does not have: what it says there, and where they are followed.
OF_TARGETS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"USE_TMA": True}, "sm_80", "from compute capability 9.0 on, and this is cuda 80", "sm_90"),
    ({"fwd_OVERLAP": True}, "gfx942", "from compute capability 9.0 on, and this is hip gfx942", "sm_120"),
    ({"FAST_TANH": True}, "gfx942", "NVIDIA GPUs have the instruction", "sm_80"),
    ({"kpack": 2}, "sm_90", "it is about AMD's GPUs, and this is cuda 90", "gfx942"),
    ({"fwd_matrix_instr_nonkdim": 16}, "sm_80", "it is about AMD's GPUs", "gfx942"),
    ({"waves_per_eu": 2}, "sm_100", "it is about AMD's GPUs", "gfx90a"),
    ({"num_warps": 32}, "gfx942", "at most 1024 threads, which are 16 warps of hip gfx942; write 16 or fewer", "sm_90"),
]


@pytest.mark.parametrize(
    ("options", "without", "message", "target"), OF_TARGETS, ids=lambda x: "-".join(x) if type(x) is dict else ""
)
def test_what_a_gpu_does_not_have_is_refused(
    options: dict[str, Any], without: str, message: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, read = problem(), {"q": DENSE, "k": DENSE, "v": DENSE}
    monkeypatch.setattr(pins, "interpreted", lambda: False)
    tiles = lambda: pins.Tiles(32, 32, 32, 32)
    with compiling_for(named(without)), pytest.raises(ValueError, match=message):
        pins.check(options, "forward", p, read, tiles, False)
    with compiling_for(named(target)):
        pins.check(options, "forward", p, read, tiles, False)


def test_options_for_a_gpu_run_without_one() -> None:
    q, k, v = (torch.randn(1, 2, L, 20) for _ in range(3))
    options = {
        "USE_TMA": True,
        "UPRIGHT": True,
        "kpack": 2,
        "BLOCK_M": 512,
        "FAST_TANH": True,
        "WARP_SPECIALIZED": True,
    }
    for backend in ("auto", "tiled", "reference"):
        out = flex_attention(q, k, v, mask_mod=masks.causal_mask, kernel_options=options, backend=backend)
        assert torch.equal(out, flex_attention(q, k, v, mask_mod=masks.causal_mask, backend=backend))


def test_every_obstacle_is_that_of_an_option() -> None:
    assert set(pins.OBSTACLES) <= set(OPTIONS)
