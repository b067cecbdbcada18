"""Tools that test a score_mod, a mask_mod or an attention of one's own: against the definition, for leaks, for differences."""

from __future__ import annotations

from .invariance import assert_batch_invariant
from .sizes import Sizes

__all__ = ["Sizes", "assert_batch_invariant"]
