"""What a compiled kernel needs of a multiprocessor: registers, spills, shared memory."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import triton


class Resources(NamedTuple):
    """Registers of a thread, bytes of it that are spilled to memory, and bytes of shared memory of a program."""

    registers: int
    spilled: int
    shared: int

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.spilled} bytes spilled, {self.shared} bytes of shared memory"


def resources(kernel: Any) -> Resources:
    """What a compiled kernel uses, read from its binary: works without a device."""
    shared = kernel.metadata.shared
    if getattr(kernel, "n_regs", None) is not None:  # loaded on a device
        return Resources(kernel.n_regs, 4 * kernel.n_spills, shared)
    if kernel.metadata.target.backend == "hip":
        text = kernel.asm["amdgcn"]
        count = {name: int(n) for name, n in re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", text)}
        return Resources(count.get("vgpr_count", 0), count.get("private_segment_fixed_size", 0), shared)
    usage = _cuobjdump("-res-usage", kernel.asm["cubin"])
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(found["REG"], max(found["STACK"], found["LOCAL"]), shared)


def instructions(kernel: Any) -> str:
    """The machine code of a kernel, for people and tests."""
    if kernel.metadata.target.backend == "hip":
        return str(kernel.asm["amdgcn"])
    return _cuobjdump("-sass", kernel.asm["cubin"])


def _cuobjdump(option: str, cubin: bytes) -> str:
    """The output of the tool that comes with Triton."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
