"""`flexattn bench [MASK or MODULE:FUNC ...]`: how long attention takes with a mod or a mask of one's own."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .failures import DIFFERS, FINE, Mistake
from .options import MASK_HELP, MOD_HELP, Command, add_device, add_dtype, notation
from .options import device as chosen_device
from .output import Output, table
from .shapes import positions, positive, seconds

if TYPE_CHECKING:
    from .contenders import Problem
    from .times import Row

_LENGTH = {"cpu": 1024, "cuda": 4096}
_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


def add(parser: argparse.ArgumentParser) -> None:
    """The mods and the problem."""
    parser.add_argument("mods", type=notation, nargs="*", metavar="MOD", help=f"{MOD_HELP} (default: causal_mask)")
    parser.add_argument("--mask", type=notation, metavar="MASK", help=f"with score_mods: {MASK_HELP}")
    parser.add_argument(
        "--length",
        type=positions,
        nargs="+",
        metavar="N",
        help="queries and keys; may be several (default: of the tensors that are read, or 1024, on a GPU 4096)",
    )
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="batch entries (default: 1)")
    parser.add_argument("--heads", type=positive, default=8, metavar="N", help="heads (default: 8)")
    parser.add_argument("--head-dim", type=positive, default=64, metavar="N", help="of query and value (default: 64)")
    add_dtype(parser, "float32, on a GPU bfloat16")
    add_device(parser)
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=0.5,
        metavar="S",
        help="of measuring for each contender and pass (default: 0.5)",
    )
    parser.add_argument("--compile", action="store_true", help="on a CPU too, time PyTorch's compiled flex_attention")


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Print a table for each mod and length."""
    import torch

    from .contenders import Problem
    from .notation import parse
    from .pairs import pair
    from .times import measure

    device = chosen_device(arguments.device)
    dtype = arguments.dtype or _DTYPE[device]
    results: list[dict[str, Any]] = []
    for text in arguments.mods or [parse("causal_mask")]:
        with torch.device(device):  # so that tensors that a mod makes are where the query is
            mods = pair(text, arguments.mask)
        for length in _lengths(mods, arguments.length, _LENGTH[device]):
            sizes = arguments.batch, arguments.heads, length, arguments.head_dim
            problem = Problem.of(mods, sizes, dtype, device, compiles=device == "cuda" or arguments.compile)
            rows = measure(problem, arguments.seconds, output)
            results.append({"subject": mods.text, **_sizes(problem), "contenders": [r.to_dict(rows[0]) for r in rows]})
            _tell(problem, rows, output)
    output.document({"device": _device(device), "dtype": dtype, "threads": torch.get_num_threads(), "results": results})
    wrong = any(c["differs"] for result in results for c in result["contenders"])
    return DIFFERS if wrong else FINE


def _lengths(mods: Any, said: list[int] | None, default: int) -> list[int]:
    """The lengths to time: as said, else as long as what is read. Raises `Mistake` for another than that of a `BlockMask`."""
    from .build import read_sizes

    if mods.block_mask is not None:
        Q_LEN, KV_LEN = mods.block_mask.seq_lengths
        if Q_LEN != KV_LEN or any(n != Q_LEN for n in said or ()):
            raise Mistake(
                f"{mods.text}: a BlockMask made for lengths (Q_LEN, KV_LEN) = {(Q_LEN, KV_LEN)}; bench times queries and keys "
                "of one length, and that of the BlockMask: leave --length out, or name its mask function"
            )
        return [Q_LEN]
    read = read_sizes(mods.score_mod, mods.mask_mod)
    return said or [min((read[axis] for axis in ("q_idx", "kv_idx") if axis in read), default=default)]


def _device(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device


def _sizes(problem: Problem) -> dict[str, Any]:
    B, H, L, E = problem.sizes
    return {"B": B, "H": H, "L": L, "E": E, "sparsity": None if problem.block is None else problem.block.sparsity()}


def _tell(problem: Problem, rows: list[Row], output: Output) -> None:
    B, H, L, E = problem.sizes
    sparse = "" if problem.block is None else f", {problem.block.sparsity():.4g} % of the scores skipped"
    output.line(f"{problem.mods.text}: B={B} H={H} L={L} E={E}, {problem.dtype}, {problem.device}{sparse}")
    shown = [("", "forward ms", "ratio", "backward ms", "ratio")]
    for row in rows:
        cells = row.to_dict(rows[0])
        numbers = [_number(cells[f"{way}_{unit}"], unit) for way in ("forward", "backward") for unit in ("ms", "ratio")]
        shown.append((f"  {row.name}", numbers[0], numbers[1], numbers[2], numbers[3]))
    for line in table(shown, numbers=frozenset((1, 2, 3, 4))):
        output.line(line)
    for row in rows:
        for remark in (row.not_run, row.differs):
            if remark:
                output.line(f"  {row.name}: {remark}")
    output.line("  ratio: how many times as long as flexattn; above 1, flexattn is faster\n")


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if unit == "ratio" or value >= 1 else f"{value:.3g}"


COMMAND = Command(
    "bench",
    "time a mod or a mask against dense attention and PyTorch's",
    "Times of one's own mod or mask, forward and backward: flexattn, scaled_dot_product_attention with the mask as a tensor, "
    "and on a GPU\nPyTorch's compiled flex_attention. One process, contenders take turns, medians. Results are compared "
    "before they are timed.",
    "flexattn bench 'sliding_window(256)' --length 1024 4096",
    add,
    run,
)
