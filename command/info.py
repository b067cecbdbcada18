"""`flexattn info`: versions, devices, and what the library would do here and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
from typing import Any

from .failures import FINE
from .options import Command
from .output import Output, table

REQUIRED = ("torch", "triton", "sympy")
OPTIONAL = {
    "matplotlib": "show --png, BlockMask.plot: pip install 'flexattn[plot]'",
    "hypothesis": "flexattn.testing.strategies: pip install 'flexattn[testing]'",
    "pytest": "the pytest plugin: pip install 'flexattn[testing]'",
    "numpy": "Triton's interpreter: pip install numpy",
}
VARIABLES = {
    "FLEXATTN_CACHE_DIR": "where tuned configurations are kept",
    "XDG_CACHE_HOME": "its parent, where FLEXATTN_CACHE_DIR is not set",
    "FLEXATTN_DEBUG": "1: indices of captured tensors are checked, and this command shows tracebacks",
    "TRITON_INTERPRET": "1: kernels run in Triton's interpreter, on a CPU, slowly",
    "TRITON_CACHE_DIR": "where Triton keeps compiled kernels",
    "CUDA_VISIBLE_DEVICES": "which GPUs there are",
    "HIP_VISIBLE_DEVICES": "which GPUs there are, on ROCm",
    "OMP_NUM_THREADS": "threads of torch's operators on a CPU",
    "TORCHINDUCTOR_CACHE_DIR": "where torch.compile keeps its code",
}


def add(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Print what there is."""
    found = facts()
    output.document(found)
    output.line("versions")
    for line in table([(f"  {name}", version or "not installed") for name, version in found["versions"].items()]):
        output.line(line)
    output.line("devices")
    for device in found["devices"]:
        words = [device["name"], device["architecture"], _gib(device["memory_bytes"])]
        output.line(f"  {device['type']}: {', '.join(w for w in words if w)}")
    output.line(f"backend 'auto'\n  {found['backend']['choice']}: {found['backend']['reason']}")
    output.line(f"Triton's interpreter\n  {'on' if found['interpreter'] else 'off'}")
    output.line("environment")
    said = [(f"  {name}={value}", VARIABLES[name]) for name, value in found["environment"].items()]
    for line in table(said) or ["  none of " + ", ".join(VARIABLES)]:
        output.line(line)
    output.line(f"tuned configurations\n  {found['cache']['entries']} in {found['cache']['folder']}")
    output.line("optional parts")
    for line in table([(f"  {n}", v or "not installed", OPTIONAL[n]) for n, v in found["optional"].items()]):
        output.line(line)
    return FINE


def facts() -> dict[str, Any]:
    """The document of `info --json`, less its first keys."""
    from flexattn import __version__, tuning_cache

    versions = {"flexattn": __version__, "python": platform.python_version()} | {n: _version(n) for n in REQUIRED}
    return {
        "versions": versions,
        "platform": platform.platform(),
        "devices": _devices(),
        "backend": _backend(),
        "interpreter": _interpreted(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "cache": {"folder": str(tuning_cache.folder()), "entries": len(tuning_cache.entries())},
        "optional": {name: _version(name) for name in OPTIONAL},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    import torch

    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    capability = torch.backends.cpu.get_cpu_capability()
    processor = platform.processor() or platform.machine()
    made: list[dict[str, Any]] = [
        {"type": "cpu", "name": f"{processor}, {cores}", "architecture": capability, "memory_bytes": None}
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        sm = f"sm_{properties.major}{properties.minor}"
        architecture = getattr(properties, "gcnArchName", "").split(":")[0] if torch.version.hip else sm
        memory = properties.total_memory
        made.append(
            {"type": f"cuda:{index}", "name": properties.name, "architecture": architecture, "memory_bytes": memory}
        )
    other = torch.accelerator.current_accelerator(check_available=True)
    if other is not None and other.type != "cuda":
        made.append({"type": other.type, "name": other.type, "architecture": None, "memory_bytes": None})
    return made


def _backend() -> dict[str, str]:
    """What backend="auto" takes for tensors on the current device, and why."""
    import torch

    from flexattn import validate

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    sample = torch.empty(1, 1, 1, 64, device=device, dtype=torch.float32)
    refusal = validate.triton_refusal(sample, sample)
    if device.type == "cpu":
        why = refusal or "can run here, but on a CPU only in Triton's interpreter, which is for testing kernels"
        return {"choice": "tiled", "reason": f"torch operators, since there is no GPU; the fused kernel {why}"}
    if refusal:
        return {"choice": "tiled", "reason": f"torch operators, since the fused kernel {refusal}"}
    limit = f"float64 and head dimensions over {validate.MAX_HEAD_DIM} take tiled"
    return {"choice": "triton", "reason": f"fused kernels on {device.type}; {limit}"}


def _interpreted() -> bool:
    if sys.platform != "linux" or importlib.util.find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("numpy") is None:
        return False
    from flexattn.backends.target import interpreted

    return interpreted()


def _gib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.0f} GiB"


COMMAND = Command(
    "info",
    "versions, devices, which backend is used and why",
    "Versions, devices, what backend='auto' takes here and why, the environment, the cache, optional parts.",
    "flexattn info --json",
    add,
    run,
)
