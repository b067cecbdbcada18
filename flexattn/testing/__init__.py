"""Tools that test a score_mod, a mask_mod or an attention of one's own: against the definition, for leaks, for differences."""

from __future__ import annotations

from .descriptions import describe
from .inputs import AttentionInputs
from .laws import LAWS, LawNotRun, check_laws
from .sizes import Sizes

__all__ = ["LAWS", "AttentionInputs", "LawNotRun", "Sizes", "check_laws", "describe"]
