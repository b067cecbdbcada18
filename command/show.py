"""`flexattn show MASK`: a mask as a picture, in numbers and as a formula."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .failures import FINE, Mistake, Unavailable, reading
from .options import MASK_HELP, Command, notation
from .output import Output, table, width
from .shapes import add_shape, chosen, index, positive

if TYPE_CHECKING:
    from flexattn.block_mask import BlockMask

_LABELS = {"simplified": "simplified", "keys of a query": "keys", "no mask": "keys"}


def add(parser: argparse.ArgumentParser) -> None:
    """The mask, its shape, and what is drawn."""
    parser.add_argument("mask", type=notation, metavar="MASK", help=MASK_HELP)
    add_shape(parser, "default: of the tensors that the mask reads, or 1024")
    parser.add_argument("--block-size", type=positive, metavar="N", help="queries and keys of a block (default: 128)")
    parser.add_argument("--batch", type=index, default=0, metavar="I", help="which batch entry is drawn (default: 0)")
    parser.add_argument("--head", type=index, default=0, metavar="I", help="which head is drawn (default: 0)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also write the picture of BlockMask.to_svg")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also write that of BlockMask.plot; needs matplotlib")


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Print the mask."""
    from flexattn.explain import explain_mask
    from flexattn.mask_algebra import whole_mask_mod
    from flexattn.mask_object import name_of

    from . import build, pictures
    from .block_masks import block_mask

    subject = build.mask(arguments.mask)
    mask = block_mask(subject, chosen(arguments), arguments.block_size)
    B, H = mask.sizes
    for name, at, size in (("batch", arguments.batch, B), ("head", arguments.head, H)):
        if at >= size:
            raise Mistake(f"--{name} {at}: the mask has {size}, counted from 0; --shape B,H,Q,KV gives it more")
    place = arguments.batch, arguments.head
    with reading(subject.text):
        formula, keys = explain_mask(whole_mask_mod(mask))
    blocks = pictures.cells(mask, *place, width())
    counted, drawn = pictures.counts(blocks), pictures.block_picture(blocks)
    keep = pictures.elements(mask, *place, width())
    files = _files(mask, arguments)
    sizes = (B, H, *mask.seq_lengths)
    output.document(
        {
            "mask": name_of(mask.mask_mod),
            "shape": sizes,
            "block_size": mask.BLOCK_SIZE,
            "batch": place[0],
            "head": place[1],
            "sparsity": mask.sparsity(),
            "blocks": counted,
            "formula": formula,
            "keys": keys.splitlines(),
            "picture": drawn,
            "elements": None if keep is None else keep.int().tolist(),
            "files": files,
        }
    )
    rows, columns = mask.BLOCK_SIZE
    facts = [
        ("mask", name_of(mask.mask_mod)),
        ("shape", f"B={B} H={H} Q_LEN={sizes[2]} KV_LEN={sizes[3]}"),
        ("blocks", f"of {rows} x {columns}: {counted.full} full, {counted.partial} partial, {counted.empty} empty"),
        ("sparsity", f"{mask.sparsity():.4g} %"),
        *_labelled("formula", formula or "everything is attended"),
        *(_labelled_line(line) for line in keys.splitlines()),
    ]
    if B * H > 1:
        facts.insert(2, ("drawn", f"batch {place[0]}, head {place[1]}"))
    for line in table(facts):
        output.line(line)
    output.line(f"\n{drawn}")
    output.line(f"{pictures.FULL} full  {pictures.PARTIAL} partial, or some of several  {pictures.EMPTY} empty")
    if keep is not None:
        output.line(f"\nelements: a row is a query, a column a key\n{pictures.element_picture(keep)}")
    for file in files:
        output.line(f"\nwritten: {file}")
    return FINE


def _labelled(label: str, text: str) -> list[tuple[str, str]]:
    """Rows of a text of several lines, of which the first has the label."""
    return [(label if number == 0 else "", line) for number, line in enumerate(text.splitlines())]


def _labelled_line(line: str) -> tuple[str, str]:
    """A line of `Explanation.blocks`: "simplified: ..." or "keys of a query: ..."."""
    label, _, text = line.partition(": ")
    return _LABELS[label], text


def _files(mask: BlockMask, arguments: argparse.Namespace) -> list[str]:
    """Write the pictures that were asked for; their names."""
    place = arguments.batch, arguments.head
    if arguments.svg is not None:
        with reading(f"--svg {arguments.svg}"):
            arguments.svg.write_text(mask.to_svg(*place) + "\n", encoding="utf-8")
    if arguments.png is not None:
        try:
            figure = mask.plot(*place).figure
        except ImportError as error:
            raise Unavailable(
                f"--png needs matplotlib: pip install 'flexattn[plot]', or write --svg FILE ({error})"
            ) from error
        with reading(f"--png {arguments.png}"):
            figure.savefig(arguments.png, format="png")
    return [str(path) for path in (arguments.svg, arguments.png) if path is not None]


COMMAND = Command(
    "show",
    "a mask as a picture, in numbers and as a formula",
    "Draw a mask: its blocks by kind, counts, sparsity, formula, where the keys of a query lie, elements if it is small.",
    "flexattn show 'causal_mask & ~sliding_window(64)' --length 1024",
    add,
    run,
)
