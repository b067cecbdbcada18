"""The sizes of an attention problem to test with, and those of a mask."""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """An attention problem: query [B, Hq, L, E], key [B, Hkv, S, E], value [B, Hkv, S, Ev].

    Example:
        >>> from flexattn.testing import Sizes
        >>> Sizes(L=64, S=96)
        Sizes(B=2, Hq=4, Hkv=2, L=64, S=96, E=32, Ev=32)
    """

    B: int = 2
    Hq: int = 4
    Hkv: int = 2
    L: int = 160
    S: int = 160
    E: int = 32
    Ev: int = 32

    def check(self) -> None:
        """Raise `ValueError` for what is no attention problem."""
        for name, n in self._asdict().items():
            if not isinstance(n, int) or isinstance(n, bool) or n < 0 or (n == 0 and name not in "LS"):
                raise ValueError(f"{name} is {n!r}; it must be a positive integer" + (", or 0" if name in "LS" else ""))
        if self.Hq % self.Hkv:
            raise ValueError(
                f"Hq={self.Hq} is no multiple of Hkv={self.Hkv}: each key head serves the same number of heads"
            )


def checked_sizes(shape: Sizes) -> Sizes:
    """The sizes, if they are those of an attention problem.

    Raises:
        TypeError: a plain number or tuple, whose numbers other checks would read as lengths of a mask.
        ValueError: sizes that do not fit together.
    """
    if not isinstance(shape, Sizes):
        raise TypeError(f"shape is {shape!r}; write Sizes(B=1, L=64, S=64), which has a default for what is left out")
    shape.check()
    return shape


def mask_shape(shape: int | tuple[int, ...]) -> tuple[int, int, int, int]:
    """(B, H, Q_LEN, KV_LEN) of a length, of (Q_LEN, KV_LEN), or of all four. Raises `ValueError` for anything else.

    Example:
        >>> mask_shape(64), mask_shape((64, 96))
        ((1, 1, 64, 64), (1, 1, 64, 96))
    """
    sizes = (shape, shape) if isinstance(shape, int) else tuple(shape) if isinstance(shape, (tuple, list)) else ()
    if len(sizes) not in (2, 4) or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in sizes):
        raise ValueError(f"shape is {shape!r}; give a length, (Q_LEN, KV_LEN), or (B, H, Q_LEN, KV_LEN)")
    B, H, Q_LEN, KV_LEN = sizes if len(sizes) == 4 else (1, 1, *sizes)
    return B, H, Q_LEN, KV_LEN


def unsaid_in(shape: object) -> dict[str, str]:
    """What to give for the batch and the heads where a shape of a mask does not tell; for `search`."""
    told = isinstance(shape, (tuple, list)) and len(shape) == 4
    return {} if told else {"b": "shape=(B, H, Q_LEN, KV_LEN)", "h": "shape=(B, H, Q_LEN, KV_LEN)"}
