"""Tools that test a score_mod, a mask_mod or an attention of one's own: against the definition, for leaks, for differences."""

from __future__ import annotations

from .gradients import Gradcheck, gradcheck
from .matches import assert_matches_reference
from .sizes import Sizes

__all__ = ["Gradcheck", "Sizes", "assert_matches_reference", "gradcheck"]
