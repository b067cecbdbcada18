"""The score_mod and the mask that a command is about: a mod on the command line, and `--mask` beside it."""

from __future__ import annotations

from typing import Any, NamedTuple

from .build import mask, subject
from .failures import Mistake
from .notation import Notation


class Pair(NamedTuple):
    """What attention is called with; either may be None.

    Attributes:
        text: both, as they were written.
        score_mod, mask_mod: the functions.
        block_mask: a `BlockMask` where one was named, in which case `mask_mod` says all that its lists say.
    """

    text: str
    score_mod: Any
    mask_mod: Any
    block_mask: Any = None

    @property
    def roles(self) -> dict[str, Any]:
        """The functions by the name of their argument."""
        return {"score_mod": self.score_mod, "mask_mod": self.mask_mod}


def pair(mod: Notation, beside: Notation | None) -> Pair:
    """What the arguments name. Raises `Mistake` for two masks."""
    first = subject(mod)
    if beside is None:
        block = first.value if first.role == "block_mask" else None
        return Pair(first.text, first.score_mod, first.mask_mod, block)
    if first.role != "score_mod":
        raise Mistake(
            f"{first.text} is a mask, and --mask {beside.text} is another one; combine them: '{first.text} & {beside.text}'"
        )
    second = mask(beside)
    block = second.value if second.role == "block_mask" else None
    return Pair(f"{first.text}, {second.text}", first.score_mod, second.mask_mod, block)
