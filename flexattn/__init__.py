"""Attention variants in a few lines of Python: traced, differentiated, block-sparse and fused."""

__version__ = "0.1.0"

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from . import (
    block_mask_tree,  # noqa: F401, registers block masks as trees
    flops,  # noqa: F401, registers the FLOP formulas
    masks,
    mods,
)
from .api import AuxOutput, AuxRequest, flex_attention
from .block_mask import BlockMask
from .codegen.errors import TraceError
from .create import create_block_mask, create_mask
from .debug import debug_mode
from .documents import Documents
from .errors import KernelError
from .explain import Explanation, explain
from .inspection import Inspection, inspect
from .masks import and_masks, noop_mask, not_mask, or_masks
from .score_plot import plot_mask, plot_scores

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "Documents",
    "Explanation",
    "Inspection",
    "KernelError",
    "TraceError",
    "and_masks",
    "create_block_mask",
    "create_mask",
    "debug_mode",
    "explain",
    "flex_attention",
    "inspect",
    "masks",
    "mods",
    "noop_mask",
    "not_mask",
    "or_masks",
    "plot_mask",
    "plot_scores",
]

# Parts that few programs need: loaded when they are first named.
_LATER = ("config", "integrations", "testing", "tuning_cache")

if _TYPE_CHECKING:
    from . import config as config
    from . import integrations as integrations
    from . import testing as testing
    from . import tuning_cache as tuning_cache
else:

    def __getattr__(name: str) -> _Any:
        if name in _LATER:
            return _import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
