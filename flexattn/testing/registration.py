"""Strategies for `hypothesis.strategies.from_type`: which type has which, made when one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..block_mask import BlockMask
from ..documents import Documents
from .inputs import AttentionInputs
from .sizes import Sizes

# The names of functions of `strategies`, which is imported when the first of them is needed.
STRATEGIES: dict[type, str] = {
    AttentionInputs: "attention_inputs",
    BlockMask: "block_masks",
    Documents: "documents",
    Sizes: "sizes",
}


def register() -> None:
    """Tell hypothesis; more than once does no harm. Imports hypothesis."""
    from hypothesis.strategies import register_type_strategy

    for type_, name in STRATEGIES.items():
        register_type_strategy(type_, _made(name))


def _made(name: str) -> Callable[[type], Any]:
    def strategy(_: type) -> Any:
        from . import strategies

        return getattr(strategies, name)()

    return strategy
