"""The warp-specialised forward kernel for Hopper GPUs: when it can take the place of the ordinary one, and its call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import KernelConfig, Pinned
from ..kernel_options import options_of, unfollowed
from ..problem import Problem
from .descriptors import TMA
from .launch import Call
from .target import Target, current, interpreted

# Whether it is taken where it can be and the caller says nothing. It has compiled and been emulated, but run on no GPU: True
# waits for tests/gpu/test_hopper_gpu.py to pass there, and for benchmarks in which it is faster than the ordinary kernel.
DEFAULT = False
OPTION = "WARP_SPECIALIZED"

BLOCK_M = 128  # two consumers of 64 rows
HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)
KEYS = (64, 128)  # of a tile
WARPS = 4  # of a consumer
STAGES = (2, 3, 4, 5, 6)  # with one, a consumer would wait for a tile that needs the place of the one it reads
_C = KernelConfig

# By the larger head dimension, in the order in which they are tried; num_stages is the length of a ring.
CONFIGURATIONS: dict[int, tuple[KernelConfig, ...]] = {
    64: (_C(BLOCK_M, 128, WARPS, 3), _C(BLOCK_M, 64, WARPS, 4)),
    128: (_C(BLOCK_M, 128, WARPS, 2), _C(BLOCK_M, 64, WARPS, 4), _C(BLOCK_M, 64, WARPS, 2)),
}


class Need(NamedTuple):
    """Something that the kernel needs of a problem: whether it has it, and what to say if not."""

    met: Callable[[Problem], bool]
    message: Callable[[Problem], str]


def _operands(problem: Problem) -> dict[str, Tensor]:
    return {"query": problem.query, "key": problem.key, "value": problem.value}


def _is_copied(t: Tensor) -> bool:
    """Whether the hardware's copies can read a tensor: aligned rows of adjacent elements, no dimension expanded."""
    outer = [s * t.element_size() for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n > 1]
    return t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in outer)


NEEDS = (
    Need(
        lambda p: p.query.dtype in DTYPES,
        lambda p: f"query, key and value are {p.query.dtype}; convert them to torch.bfloat16 or torch.float16",
    ),
    Need(
        lambda p: p.query.shape[-1] in HEAD_DIMS and p.value.shape[-1] in HEAD_DIMS,
        lambda p: f"the head dimensions are {p.query.shape[-1]} and {p.value.shape[-1]}; it has tiles for 64 and 128",
    ),
    Need(lambda p: p.key.shape[2] > 0, lambda p: "there are no keys; pass at least one"),
    Need(
        lambda p: not p.block_mask or (p.block_size[0] % BLOCK_M == 0 and p.block_size[1] % min(KEYS) == 0),
        lambda p: (
            f"BLOCK_SIZE is {tuple(p.block_size)}; make the block mask with a multiple of {BLOCK_M} queries and of "
            f"{min(KEYS)} keys, such as the default BLOCK_SIZE=128"
        ),
    ),
    Need(
        lambda p: all(_is_copied(t) for t in _operands(p).values()),
        lambda p: (
            f"{next(n for n, t in _operands(p).items() if not _is_copied(t))} is expanded, or its rows are not adjacent "
            "elements that start at multiples of 16 bytes; pass it through .clone(memory_format=torch.contiguous_format)"
        ),
    ),
)


def obstacle(problem: Problem, target: Target | None, pinned: Pinned) -> str:
    """Why the kernel cannot compute a problem on a target (None: none with kernels), and what to do; empty if it can."""
    if target is None or target.backend != "cuda" or target.arch != 90:
        device = "Triton's interpreter" if target is None else f"{target.backend} {target.arch}"
        return f"the kernel is for GPUs of compute capability 9.0, and this is {device}"
    for need in NEEDS:
        if not need.met(problem):
            return need.message(problem)
    allowed = {"BLOCK_M": (BLOCK_M,), "BLOCK_N": KEYS, "num_warps": (WARPS,), "num_stages": STAGES}
    for name, values in allowed.items():
        if getattr(pinned, name) not in (None, *values):
            return f"{name} is {getattr(pinned, name)}; leave {name} out or write {' or '.join(map(str, values))}"
    return ""


def chosen(call: Call, problem: Problem, options: Mapping[str, Any], target: Target | None = None) -> Call:
    """The call of the forward kernel that options ask for on a target, by default the current device, given that of the
    ordinary one.

    Raises `ValueError` where WARP_SPECIALIZED is asked for and not possible.
    """
    asked = options_of(options, forward=True).get(OPTION)
    if not (DEFAULT if asked is None else asked):
        return call
    found = obstacle(problem, None if interpreted() else target or current(), call.pinned)
    if not found:
        return specialised(call, problem)
    if asked:
        raise unfollowed(options, True, OPTION, found)
    return call


def specialised(call: Call, problem: Problem) -> Call:
    """The call of the warp-specialised kernel in the place of the ordinary one's, for a problem without `obstacle`."""
    # Here, since Gluon takes its time to be imported.
    from ..codegen.gluon_form import gluon_form
    from ..templates.hopper_forward import CONSUMERS, attention_forward_hopper

    tensors = {"q": problem.query, "k": problem.key, "v": problem.value}
    unused = {place for name in tensors for place in TMA[name]}  # this kernel's own descriptors stand for the matrices
    arguments = {name: value for name, value in call.arguments.items() if name not in tensors}
    arguments |= {name: gluon_form(arguments[name]) for name in ("score_mod", "mask_mod")}
    arguments["batch_step"] = int(problem.key.shape[0] > 1)

    def shaped(config: KernelConfig) -> dict[str, Any]:
        values = {name: value for name, value in call.shaped(config).items() if name not in unused}
        BLOCK_N = values["shape"].BLOCK_N
        keys = int(getattr(BLOCK_N, "value", BLOCK_N))
        rows = {"q": BLOCK_M // CONSUMERS.value, "k": keys, "v": keys}
        return values | {n: _descriptor(t, rows[n]) for n, t in tensors.items()} | {"STAGES": config.num_stages}

    fixed = {name: value for name, value in call.pinned._asdict().items() if value is not None}
    configurations = CONFIGURATIONS[max(problem.query.shape[-1], problem.value.shape[-1])]
    return call._replace(
        kernel=attention_forward_hopper,
        key=("hopper", *call.key),
        arguments=arguments,
        shaped=shaped,
        configurations=tuple(dict.fromkeys(c._replace(**fixed) for c in configurations)),
    )


def _descriptor(t: Tensor, rows: int) -> Any:
    """What the hardware's copies are told of a matrix: boxes of so many rows of one head."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    box = [1, 1, rows, t.shape[-1]]
    strides = [s if n > 1 else t.shape[-1] for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True)]
    layout = gl.NVMMASharedLayout.get_default_for(box, {2: gl.float16}[t.element_size()])
    return TensorDescriptor(t, list(t.shape), [*strides, 1], box, layout)
