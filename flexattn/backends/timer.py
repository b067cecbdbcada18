"""How long a run takes on a GPU: between two events, with cold caches."""

from __future__ import annotations

from collections.abc import Callable

import torch

Timer = Callable[[Callable[[], None]], float]  # runs its argument once; milliseconds

L2 = 64 << 20  # bytes, where the driver does not tell
WRITES = 8  # of the whole L2 cache and more: what the device does while the host queues the run


def event_timer(device: torch.device) -> Timer:
    """A timer for runs on the current stream of a CUDA or ROCm device. Waits for the device."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or L2
    buffer = torch.empty(2 * cache, dtype=torch.int8, device=device)

    def milliseconds(run: Callable[[], None]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(WRITES):
            buffer.zero_()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop))

    return milliseconds
