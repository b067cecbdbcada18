"""Tools that test a score_mod, a mask_mod or an attention of one's own: against the definition, for leaks, for differences."""

from __future__ import annotations

import sys

from .causal import assert_causal
from .descriptions import describe
from .gradients import Gradcheck, gradcheck
from .inputs import AttentionInputs
from .invariance import assert_batch_invariant
from .laws import LAWS, LawNotRun, check_laws
from .leaks import assert_no_leak
from .mask_diff import Counterexample, MaskDiff, mask_diff
from .matches import assert_matches_reference
from .sizes import Sizes

__all__ = [
    "LAWS",
    "AttentionInputs",
    "Counterexample",
    "Gradcheck",
    "LawNotRun",
    "MaskDiff",
    "Sizes",
    "assert_batch_invariant",
    "assert_causal",
    "assert_matches_reference",
    "assert_no_leak",
    "check_laws",
    "describe",
    "gradcheck",
    "mask_diff",
]

# Where hypothesis is imported later, it calls `flexattn_plugins.hypothesis_hook`, which does the same.
if "hypothesis" in sys.modules:
    from . import registration

    registration.register()
