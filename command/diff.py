"""`flexattn diff MASK_A MASK_B`: whether two masks attend to the same, and where they do not."""

from __future__ import annotations

import argparse

from .failures import DIFFERS, FINE, reading
from .options import MASK_HELP, Command, notation
from .output import Output
from .shapes import add_shape, chosen

_DEFAULT_LENGTH = 256


def add(parser: argparse.ArgumentParser) -> None:
    """The masks and the shape."""
    parser.add_argument("a", type=notation, metavar="MASK_A", help=MASK_HELP)
    parser.add_argument("b", type=notation, metavar="MASK_B", help="another one")
    add_shape(parser, f"default: of the tensors that the masks read, or {_DEFAULT_LENGTH}")


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Print the difference."""
    from flexattn.testing import mask_diff

    from . import build
    from .block_masks import mask_shape

    a, b = build.mask(arguments.a), build.mask(arguments.b)
    shape = mask_shape(chosen(arguments), a, b, default=_DEFAULT_LENGTH)
    with reading(f"{a.text}, {b.text}"):
        found = mask_diff(a.value, b.value, shape)
    output.document({"a": a.text, "b": b.text, **found.to_dict()})
    output.line(str(found))
    return FINE if found.equal else DIFFERS


COMMAND = Command(
    "diff",
    "whether two masks are equal, and where they differ",
    "Compare two masks element by element, or prove them equal for every shape. Exit code 1 where they differ.",
    "flexattn diff 'sliding_window(64)' my/masks.py:window --length 512",
    add,
    run,
)
