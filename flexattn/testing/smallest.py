"""The smallest sizes at which something fails: a greedy, bounded search."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from .sizes import Sizes

TRIES = 120
SECONDS = 30.0


def smallest(sizes: Sizes, fails: Callable[[Sizes], bool], least: Sizes | None = None) -> Sizes:
    """Sizes at which `fails` is true and from which none of B, Hq, Hkv, L, S, E, Ev could be made smaller alone.

    `fails` is true of `sizes`. Each size is reduced by half of itself, then by smaller and smaller steps down to one; groups of
    heads stay whole. L and S, or E and Ev, are reduced together first where they are equal: an implementation may need that.
    `least` are the sizes to stop at, by default 1. Stops after `TRIES` calls or `SECONDS`, with what it has.

    Example:
        >>> smallest(Sizes(), lambda sizes: sizes.S > 128)
        Sizes(B=1, Hq=1, Hkv=1, L=1, S=129, E=1, Ev=1)
    """
    least, end, tries = least or Sizes(1, 1, 1, 1, 1, 1, 1), time.monotonic() + SECONDS, 0
    reduced = True
    while reduced:
        reduced = False
        for name in ("B", "Hkv", "Hq", "E", "Ev", "L", "S"):
            step = getattr(sizes, name) // 2
            while step:
                for candidate in _reduced(sizes, name, step, least):
                    tries += 1
                    if tries > TRIES or time.monotonic() > end:
                        return sizes
                    if fails(candidate):
                        sizes, reduced = candidate, True
                        step = min(step, getattr(sizes, name) - 1)
                        break
                else:
                    step //= 2
    return sizes


def _reduced(sizes: Sizes, name: str, step: int, least: Sizes) -> Iterator[Sizes]:
    """One size less by `step`, where that is an attention problem and not less than allowed."""
    group, n = sizes.Hq // sizes.Hkv, getattr(sizes, name) - step
    changes: dict[str, tuple[dict[str, int], ...]] = {
        "Hkv": ({"Hkv": n, "Hq": n * group}, {"Hkv": n}),
        "Hq": ({"Hq": n // sizes.Hkv * sizes.Hkv},),
    }
    for one, other in (("L", "S"), ("E", "Ev")):
        if getattr(sizes, one) == getattr(sizes, other):
            changes[one] = {one: n, other: n}, {one: n}
    for change in changes.get(name, ({name: n},)):
        made = sizes._replace(**change)
        if made != sizes and all(a <= b for a, b in zip(least, made, strict=True)) and made.Hq % made.Hkv == 0:
            yield made
