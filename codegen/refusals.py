"""What a mod may not call, and what to write instead."""

from __future__ import annotations

from .errors import TraceError


def unsupported(name: str) -> TraceError:
    return TraceError(
        f"calls `{name}`, which has no counterpart in a kernel",
        "Mods may use elementwise torch functions, indexing of captured tensors and small reductions of captured rows.",
        "an expression of supported functions (docs/operations.md lists them)",
    )


def random_number(name: str) -> TraceError:
    return TraceError(
        f"draws random numbers with `{name}`",
        "The mod is traced once, so every score would get the same number.",
        "draw outside and index the result: noise[b, h, q_idx, kv_idx]",
    )


def write(name: str) -> TraceError:
    return TraceError(
        f"writes to a captured tensor with `{name}`",
        "The kernel runs for all elements at once and in no order, so a write has no defined result.",
        "a new value: x = t[h] + 1, and updates outside the mod",
    )
