"""The machine that measures: versions, and the GPU's clock and power while it works. Only read, never set."""

from __future__ import annotations

import contextlib
import platform
import re
import statistics
import subprocess
import threading
import time
from typing import Any, NamedTuple

import torch

import flexattn

SAMPLED = {"sm_mhz": "clocks.sm", "power_w": "power.draw", "celsius": "temperature.gpu"}


def machine(device: str) -> dict[str, Any]:
    """Names and versions."""
    found: dict[str, Any] = {"torch": torch.__version__, "flexattn": flexattn.__version__}
    found |= {"python": platform.python_version()}
    if device == "cpu":
        return {"gpu": None, "cpu": platform.processor() or platform.machine(), **found}
    import triton

    found |= {"triton": triton.__version__, "cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda}
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    try:
        said = subprocess.run(smi(query, "csv,noheader"), capture_output=True, text=True, check=True, timeout=60).stdout
        driver, *clocks = said.strip().split(", ")
        found |= {"driver": driver, "clocks": dict(zip(query.split(",")[1:], clocks, strict=True))}
    except (OSError, ValueError, subprocess.SubprocessError):
        found |= {"driver": None, "clocks": None}
    return {"gpu": torch.cuda.get_device_name(), **found}


def short_name(gpu: str | None) -> str:
    """A name for files: h200 of "NVIDIA H200", a100-sxm4-80gb of "NVIDIA A100-SXM4-80GB", cpu of None."""
    return re.sub(r"[^a-z0-9]+", "-", (gpu or "cpu").lower().replace("nvidia", "").replace("geforce", "")).strip("-")


def smi(query: str, form: str, *more: str) -> list[str]:
    """The command that asks for properties of the GPU in use, by its identity: its number may be another one there."""
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    which = "0" if uuid is None else f"GPU-{uuid}"
    return ["nvidia-smi", f"--query-gpu={query}", f"--format={form}", f"--id={which}", *more]


class Sample(NamedTuple):
    """One reading. `at` is time.monotonic()."""

    at: float
    sm_mhz: float
    power_w: float
    celsius: float


class Sampler(contextlib.AbstractContextManager["Sampler"]):
    """Reads nvidia-smi about once a second, on a thread, while the context is open. Without it there are no samples."""

    def __init__(self, device: str) -> None:
        self.device, self.samples = device, list[Sample]()
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Sampler:
        if self.device == "cuda":
            command = smi(",".join(SAMPLED.values()), "csv,noheader,nounits", "--loop-ms=1000")
            with contextlib.suppress(OSError):
                self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                threading.Thread(target=self.read, args=(self.process.stdout,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def read(self, lines: Any) -> None:
        """Keep what each line says; lines that are no numbers are left out."""
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):
                self.samples.append(Sample(time.monotonic(), *map(float, line.split(","))))

    def median(self, since: float = 0.0) -> dict[str, float]:
        """The medians of what was read since then; nothing if nothing was."""
        found = [s for s in self.samples if s.at >= since]
        return {name: statistics.median(getattr(s, name) for s in found) for name in SAMPLED} if found else {}

    def summary(self) -> dict[str, Any]:
        """Least, median and largest of all samples, by name, and their number."""
        if not self.samples:
            return {"samples": 0}
        columns = {name: [getattr(s, name) for s in self.samples] for name in SAMPLED}
        return {"samples": len(self.samples)} | {
            name: {"least": min(c), "median": statistics.median(c), "largest": max(c)} for name, c in columns.items()
        }
