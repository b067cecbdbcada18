"""Debug mode: whether calls are checked before they are made. What is looked for is in `checks`.

Without it an index out of range reads the nearest element that exists, which is what a kernel can afford, and nan goes on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ENABLED: ContextVar[bool] = ContextVar(
    "flexattn_debug", default=os.environ.get("FLEXATTN_DEBUG", "0") not in ("0", "")
)


@contextmanager
def debug_mode(enabled: bool = True) -> Iterator[None]:
    """Check every attended element of the calls inside the `with`; also switched on by the environment: FLEXATTN_DEBUG=1.

    Errors name the element, the captured tensors by their names in your code, and your line. An index that is negative for
    some elements only, which torch reads from the end, is warned of. Costs about as much as another forward pass, and no
    more memory; the same for every backend. Compiled code is not checked: call the function without `torch.compile`.

    Raises:
        IndexError: from the attention call, for an index of a captured tensor that is out of range.
        FloatingPointError: from the attention call, for a query, key or value that is not finite in a block that is
            visited; for a modified score of nan or +inf; and for a gradient of the score_mod that is not finite although
            the score is, where a gradient is wanted.

    Example:
        >>> import torch, flexattn
        >>> q, k, v = (torch.ones(1, 1, 4, 8) for _ in range(3))
        >>> short, scale = torch.zeros(3), torch.tensor([1.0, 1.0, 0.0, 1.0])
        >>> with flexattn.debug_mode():
        ...     flexattn.flex_attention(q, k, v, score_mod=lambda score, b, h, q_idx, kv_idx: score + short[q_idx])
        Traceback (most recent call last):
        IndexError: index 3 is out of range for dimension 0 (size 3) of captured tensor short of shape [3], read as \
short[q_idx] at b=0, h=0, q_idx=3, kv_idx=0
        >>> with flexattn.debug_mode():
        ...     flexattn.flex_attention(q, k, v, score_mod=lambda score, b, h, q_idx, kv_idx: score / scale[kv_idx])
        Traceback (most recent call last):
        FloatingPointError: the modified score is inf at b=0, h=0, q_idx=0, kv_idx=2, which is attended to; the score was \
2.82843: `score / scale[kv_idx]` is inf where score = 2.82843, scale[kv_idx] = 0
        score_mod reads scale[2] = 0
    """
    token = _ENABLED.set(enabled)
    try:
        yield
    finally:
        _ENABLED.reset(token)


def debugging() -> bool:
    """Whether debug mode is on."""
    return _ENABLED.get()
