"""Things a user should know once: that a call takes a slower path than it could."""

from __future__ import annotations

import warnings
from functools import cache

from .codegen.private import constant_while_compiling


@cache
def say_once(message: str) -> None:
    """Warn, the first time in this process."""
    warnings.warn(message, stacklevel=4)


@constant_while_compiling
def say_rebuilt_mask() -> bool:
    """Called from code that Dynamo traces: it runs while tracing and leaves nothing in the graph."""
    say_once(
        "flex_attention(mask_mod=...) inside torch.compile builds the block mask anew at every call. Build it once outside, "
        "with create_block_mask, and pass block_mask="
    )
    return True
