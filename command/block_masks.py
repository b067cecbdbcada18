"""The block mask that a notation and a shape describe."""

from __future__ import annotations

from flexattn.block_mask import BlockMask
from flexattn.create import create_block_mask

from .build import Subject, read_sizes
from .failures import Mistake, reading
from .shapes import DEFAULT_LENGTH, Shape

_READ_BY = {"B": "b", "H": "h", "Q_LEN": "q_idx", "KV_LEN": "kv_idx"}


def mask_shape(shape: Shape | None, *subjects: Subject, default: int = DEFAULT_LENGTH) -> tuple[int, int, int, int]:
    """(B, H, Q_LEN, KV_LEN): as said, else that of a `BlockMask`, else of the tensors that are read, else the default.

    Raises `Mistake` for a shape that is not that of a `BlockMask`.
    """
    implied: dict[str, int] = {}
    for subject in subjects:
        if subject.role == "block_mask":
            sizes = dict(zip(_READ_BY, (*subject.value.sizes, *subject.value.seq_lengths), strict=True))
            lengths = (sizes["Q_LEN"], sizes["KV_LEN"])
            if shape is not None and lengths != (shape.Q_LEN, shape.KV_LEN):
                raise Mistake(
                    f"{subject.text} is a BlockMask made for lengths (Q_LEN, KV_LEN) = {lengths}, not "
                    f"{(shape.Q_LEN, shape.KV_LEN)}; leave --length and --shape out"
                )
            sizes = {name: n for name, n in sizes.items() if n > 1 or name not in "BH"}
        else:
            read = read_sizes(None, subject.mask_mod)
            sizes = {name: read[axis] for name, axis in _READ_BY.items() if axis in read}
        for name, n in sizes.items():
            implied[name] = min(n, implied.get(name, n))
    said = {} if shape is None else {name: n for name, n in shape._asdict().items() if n is not None}
    # A sequence that attends to itself has one length: where one is known it is the other.
    lengths_known = [n for name, n in (implied | said).items() if name not in "BH"]
    length = lengths_known[0] if lengths_known else default
    found = {"B": 1, "H": 1, "Q_LEN": length, "KV_LEN": length} | implied | said
    return found["B"], found["H"], found["Q_LEN"], found["KV_LEN"]


def block_mask(subject: Subject, shape: Shape | None, block_size: int | None) -> BlockMask:
    """The mask's lists. Raises `Mistake` for what does not fit, and for a mask that cannot be traced."""
    if subject.role == "block_mask" and block_size is not None and subject.value.BLOCK_SIZE != (block_size,) * 2:
        raise Mistake(
            f"{subject.text} is a BlockMask with blocks of {subject.value.BLOCK_SIZE}; leave --block-size out"
        )
    sizes = mask_shape(shape, subject)
    if subject.role == "block_mask":
        made: BlockMask = subject.value
        return made
    with reading(subject.text):
        return create_block_mask(subject.mask_mod, *sizes, device="cpu", BLOCK_SIZE=block_size or 128)
