"""Which GPU kernels are compiled for: the current device, or one that is only named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

_KIB = 1024
# Shared memory that one program can have: NVIDIA, "CUDA C++ Programming Guide", table of technical specifications;
# AMD, LDS of a workgroup, "Instruction Set Architecture" documents of CDNA 3 and 4.
SHARED_MEMORY = {
    80: 163 * _KIB, 86: 99 * _KIB, 87: 163 * _KIB, 89: 99 * _KIB, 90: 227 * _KIB,
    100: 227 * _KIB, 103: 227 * _KIB, 120: 99 * _KIB, 121: 99 * _KIB,
    "gfx90a": 64 * _KIB, "gfx942": 64 * _KIB, "gfx950": 160 * _KIB,
}  # fmt: skip


class Target(NamedTuple):
    """backend "cuda" or "hip", architecture (90, "gfx942"), and the shared memory of a program in bytes."""

    backend: str
    arch: int | str
    shared_memory: int


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on tensors of any device. Decided when Triton is imported."""
    return not isinstance(triton.language.sum, triton.JITFunction)


def current() -> Target:
    """The target of the current device."""
    active = triton.runtime.driver.active
    target = active.get_current_target()
    properties = active.utils.get_device_properties(active.get_current_device())
    return Target(target.backend, target.arch, properties["max_shared_mem"])


def named(name: str) -> Target:
    """The target called "sm_90" or "gfx942". Raises `ValueError` for others than those in `SHARED_MEMORY`."""
    match = re.fullmatch(r"sm_(\d+)a?", name)
    arch: int | str = int(match[1]) if match else name
    if arch not in SHARED_MEMORY:
        known = ", ".join(f"sm_{a}" if isinstance(a, int) else str(a) for a in SHARED_MEMORY)
        raise ValueError(f"unknown target {name!r}; known are {known}")
    return Target("cuda" if match else "hip", arch, SHARED_MEMORY[arch])


class _NamedDevice:
    """What Triton asks of a driver in order to compile: a device that cannot be launched on."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        warp = 32 if self.target.backend == "cuda" else 64
        return GPUTarget(self.target.backend, self.target.arch, warp)

    def get_current_device(self) -> Any:
        return self.target  # a key of Triton's caches

    def get_current_stream(self, device: Any) -> int:
        return 0


@contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Inside, Triton compiles for `target`; nothing can be launched. No device is needed."""
    config = triton.runtime.driver
    before = config._active
    config.set_active(_NamedDevice(target))
    try:
        yield
    finally:
        config.set_active(before)
