"""One attention call, as the operators receive it and the backends solve it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .codegen.pipeline import Variant


class Problem(NamedTuple):
    """Operands that have been validated.

    Attributes:
        query: [B, Hq, L, E].
        key, value: [B or 1, Hkv, S, E] and [B or 1, Hkv, S, Ev], the query's dtype.
        captured: the variant's captured tensors, then its run-time floats, symbolic ones as 0-d tensors.
        block_mask: kv_num_blocks, kv_indices, and if there are full blocks full_kv_num_blocks, full_kv_indices; each
            with a batch and head size of 1 or B and Hq. Empty: everything is in one partial block.
        ints: the variant's run-time integers.
        block_size: (queries, keys) of a block.
        variant: what to compute.
        given_scale: factor of the dot products, beside the variant's own `scale`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    captured: Sequence[Any]
    block_mask: Sequence[Tensor]
    ints: Sequence[int]
    block_size: tuple[int, int]
    variant: Variant
    given_scale: float

    @property
    def scale(self) -> float:
        """Factor of the dot products, of which the variant's `unscaled` score is a function."""
        number = self.variant.scale
        return self.given_scale if number is None else self.given_scale * float(self.floats[number])

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The captured tensors without the run-time floats."""
        return self.captured[: len(self.variant.captured)]

    @property
    def floats(self) -> Sequence[float | Tensor]:
        """The run-time floats."""
        n = len(self.variant.captured)
        return self.captured[n : n + self.variant.n_floats]
