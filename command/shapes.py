"""The shape of a mask on the command line: `--length 1024`, `--shape 512,1024` or `--shape 2,8,512,1024`."""

from __future__ import annotations

import argparse
from typing import NamedTuple

DEFAULT_LENGTH = 1024
_LONGEST = 2**31 - 1  # positions are int32


class Shape(NamedTuple):
    """(B, H, Q_LEN, KV_LEN); B and H are None where they were not said."""

    B: int | None
    H: int | None
    Q_LEN: int
    KV_LEN: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The same with 1 for what was not said."""
        return (self.B or 1, self.H or 1, self.Q_LEN, self.KV_LEN)


def shape(text: str) -> Shape:
    """`--shape`: Q,KV or B,H,Q,KV."""
    words = text.replace(" ", "").strip("()").split(",")
    if len(words) not in (2, 4) or not all(w.isdigit() for w in words):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape; write Q,KV or B,H,Q,KV, such as 512,1024 or 2,8,512,1024"
        )
    numbers = [int(w) for w in words]
    if 0 in numbers:
        raise argparse.ArgumentTypeError(f"{text!r} has a size of 0; sizes are 1 or more")
    for n in numbers:
        _check_length(n)
    return Shape(None, None, *numbers) if len(numbers) == 2 else Shape(*numbers)


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on, such as 128")
    return int(text)


def positions(text: str) -> int:
    """`--length`: a number of positions."""
    return _check_length(positive(text))


def _check_length(n: int) -> int:
    if n > _LONGEST:
        raise argparse.ArgumentTypeError(f"{n} is too long: positions are 32-bit integers, write {_LONGEST} at most")
    return n


def index(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def seconds(text: str) -> float:
    """A time."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds, such as 0.5")
    return found


def add_shape(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --length and --shape, of which one may be given; `default` says what happens without."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--length", type=positions, metavar="N", help=f"queries and keys ({default})")
    group.add_argument("--shape", type=shape, metavar="SHAPE", help="Q,KV or B,H,Q,KV, in place of --length")


def chosen(arguments: argparse.Namespace) -> Shape | None:
    """What --length or --shape say, if one was given."""
    found: Shape | None = arguments.shape
    return Shape(None, None, arguments.length, arguments.length) if arguments.length else found
