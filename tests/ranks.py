"""Runs scenarios on several processes that talk by gloo, and says what failed on which.

A scenario is a function without arguments in one of MODULES, with `@scenario(world)`. Each has a process group of its own,
so that a failure, which leaves the other ranks waiting, does not spread to the next. To see one, or all with their times:
`python tests/ranks.py the_name_of_the_scenario`.
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
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

MODULES = ("ranks_dtensor", "ranks_models")
TIMEOUT = 60  # seconds that a collective may take
SCENARIOS: dict[str, tuple[int, Callable[[], None]]] = {}


def scenario(world: int = 2) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a scenario for so many ranks."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        assert function.__name__ not in SCENARIOS
        SCENARIOS[function.__name__] = (world, function)
        return function

    return register


def named(world: int) -> list[str]:
    """The scenarios for so many ranks."""
    for module in MODULES:
        importlib.import_module(module)
    return [name for name, (ranks, _) in SCENARIOS.items() if ranks == world]


def failures(world: int, names: Sequence[str], limit: float = 300, show: bool = False) -> str:
    """Run scenarios on `world` ranks; what failed, as text, empty if nothing did. `show` prints what rank 0 prints."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TRITON_INTERPRET": "0",  # the interpreter of Triton costs time, and is not what is tested
            "GLOO_SOCKET_IFNAME": "lo",
            "TORCHINDUCTOR_CACHE_DIR": os.path.join(folder, "compiled"),  # that of all ranks, as on one machine
        }
        outputs = [Path(folder, f"output{rank}") for rank in range(world)]
        processes = []
        for rank, output in enumerate(outputs):
            command = [sys.executable, __file__, "--rank", folder, str(world), str(rank), *names]
            with output.open("w") as file:
                processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
        said = []
        end = time.monotonic() + limit
        try:
            for process in processes:
                process.wait(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            said.append(f"the ranks did not end within {limit} seconds")
        for rank, process in enumerate(processes):
            if process.poll() is None:
                process.kill()
                process.wait()
            if show and not rank:
                print(outputs[rank].read_text())
            done = Path(folder, f"done{rank}")
            ran = json.loads(done.read_text()) if done.exists() else {}
            said += [f"{name} on rank {rank}:\n{error}" for name, error in ran.items() if error]
            if missing := [name for name in names if name not in ran]:
                said.append(f"rank {rank} did not run {missing}:\n{outputs[rank].read_text()}")
        return "\n".join(said)


def _run(folder: str, world: int, rank: int, names: Sequence[str]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    results: dict[str, str | None] = {}
    for name in names:
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
        except (Exception, pytest.fail.Exception):
            results[name] = traceback.format_exc()
        print(f"{name}: {time.monotonic() - begun:.1f} s", flush=True)
        dist.destroy_process_group()
        Path(folder, f"done{rank}").write_text(json.dumps(results))


if __name__ == "__main__":
    sys.modules["ranks"] = sys.modules["__main__"]  # one table of scenarios, however this file is called
    if sys.argv[1:2] == ["--rank"]:
        here, world, rank, *names = sys.argv[2:]
        named(int(world))
        _run(here, int(world), int(rank), names)
    else:
        for world in (2, 4):
            if names := [name for name in named(world) if name in (sys.argv[1:] or SCENARIOS)]:
                begun = time.monotonic()
                print(failures(world, names, show=True) or "all right")
                print(f"{time.monotonic() - begun:.1f} s on {world} ranks")
