"""Runs scenarios on several processes that talk by gloo, and says what failed on which.

A scenario is a function without arguments in a file `tests/ranks_*.py`, with `@scenario(world)`. Each has a process group of
its own, so that a failure, which leaves the other ranks waiting, does not spread to the next. To look at one:
`python tests/ranks.py ranks_dtensor the_name_of_the_scenario`.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

TIMEOUT = 30  # seconds that a collective may take
SCENARIOS: dict[str, tuple[int, Callable[[], None]]] = {}


def scenario(world: int = 2) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a scenario for so many ranks."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        SCENARIOS[function.__name__] = (world, function)
        return function

    return register


def failures(module: str, world: int, names: list[str] | None = None, limit: float = 240) -> str:
    """Run the scenarios of a file that are for `world` ranks; what failed, as text, empty if nothing did."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--rank", folder, module, str(world)]
        # The interpreter of Triton costs time, and is not what is tested.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "GLOO_SOCKET_IFNAME": "lo"}
        ranks = [
            subprocess.Popen(
                [*command, str(rank), *(names or [])],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        end = time.monotonic() + limit
        said = []
        for rank, process in enumerate(ranks):
            try:
                printed, _ = process.communicate(timeout=max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                printed, _ = process.communicate()
                said.append(f"rank {rank} did not end within {limit} seconds")
            if process.returncode:
                said.append(f"rank {rank} ended with {process.returncode}:\n{printed}")
            done = Path(folder, f"done{rank}")
            ran = json.loads(done.read_text()) if done.exists() else {}
            said += [f"{name} on rank {rank}:\n{error}" for name, error in ran.items() if error]
            wanted = [n for n in _names(module, world) if not names or n in names]
            if missing := [n for n in wanted if n not in ran]:
                said.append(f"rank {rank} did not run {missing}")
        return "\n".join(said)


def _names(module: str, world: int) -> list[str]:
    importlib.import_module(module)
    return [n for n, (w, f) in SCENARIOS.items() if w == world and f.__module__ == module]


def _run(folder: str, module: str, world: int, rank: int, names: list[str]) -> None:
    import torch
    import torch.distributed as dist

    sys.modules["ranks"] = sys.modules["__main__"]  # one table, however this file is called
    torch.set_num_threads(1)
    results: dict[str, str | None] = {}
    for name in names or _names(module, world):
        if not names or name in _names(module, world):
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/{name}",
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=TIMEOUT),
            )
            torch.manual_seed(0)
            begun = time.monotonic()
            try:
                SCENARIOS[name][1]()
                results[name] = None
            except Exception:
                results[name] = traceback.format_exc()
            if rank == 0:
                print(f"{name}: {time.monotonic() - begun:.1f} s", flush=True)
            dist.destroy_process_group()
            Path(folder, f"done{rank}").write_text(json.dumps(results))


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        _run(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6:])
    else:
        sys.modules["ranks"] = sys.modules["__main__"]
        importlib.import_module(sys.argv[1])
        chosen = sys.argv[2:] or list(SCENARIOS)
        for n in sorted({SCENARIOS[name][0] for name in chosen}):
            begun = time.monotonic()
            print(failures(sys.argv[1], n, [c for c in chosen if SCENARIOS[c][0] == n]) or f"{n} ranks: all right")
            print(f"{time.monotonic() - begun:.1f} s")
