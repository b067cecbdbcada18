"""`flexattn check MODULE:FUNC`: a mod or a mask through all tests there are for one."""

from __future__ import annotations

import argparse
import re
import time
import traceback
from typing import TYPE_CHECKING, Any

from .failures import DIFFERS, FINE, Mistake, Unavailable, reading, told
from .options import BACKENDS, MASK_HELP, MOD_HELP, Command, add_device, add_dtype, notation, one_of
from .options import device as chosen_device
from .output import Output
from .shapes import add_shape, chosen, index, positive

if TYPE_CHECKING:
    from torch import Tensor

    from flexattn.testing import Sizes

    from .checks import Outcome
    from .pairs import Pair


def add(parser: argparse.ArgumentParser) -> None:
    """The mod, the problem, and what is asked of it."""
    parser.add_argument("mod", type=notation, metavar="MODULE:FUNC", help=MOD_HELP)
    parser.add_argument("--mask", type=notation, metavar="MASK", help=f"with a score_mod: {MASK_HELP}")
    add_shape(parser, "default: of the tensors that are read, or 160")
    parser.add_argument("--kv-heads", type=positive, metavar="N", help="key and value heads (default: half the heads)")
    parser.add_argument("--head-dim", type=positive, default=32, metavar="N", help="of query and value (default: 32)")
    add_dtype(parser)
    add_device(parser)
    parser.add_argument("--backend", type=one_of(BACKENDS), default="auto", metavar="NAME", help=", ".join(BACKENDS))
    parser.add_argument(
        "--documents",
        type=ids,
        metavar="LENGTHS",
        help="no document may see another one, and with batch_invariant= each gets the same bits in any packing: lengths such "
        "as 60,40,60, or MODULE:NAME of ids or of a Documents",
    )
    parser.add_argument("--causal", action="store_true", help="no query may see a later key")
    parser.add_argument(
        "--within",
        type=ids,
        metavar="IDS",
        help="with --causal: positions with the same id, 0 or more, may see each other both ways, as those of an image: "
        "MODULE:NAME of ids, or lengths",
    )
    parser.add_argument(
        "--offset",
        type=index,
        metavar="N",
        help="with --causal: where the first query stands among the keys (default: 0)",
    )


def ids(text: str) -> Any:
    """`--documents` and `--within`: lengths, or a notation."""
    words = text.replace(" ", "").split(",")
    if all(re.fullmatch(r"\d+", w) for w in words):
        return [int(w) for w in words]
    if ":" not in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} has no lengths; write 60,40,60, or MODULE:NAME of ids or of a Documents"
        )
    return notation(text)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Print a line a check."""
    import torch

    from .checks import CHECKS, Case, Causal
    from .pairs import pair

    for name in ("within", "offset"):
        if getattr(arguments, name) is not None and not arguments.causal:
            raise Mistake(f"--{name} says what --causal allows; write --causal too")
    device = chosen_device(arguments.device)
    with torch.device(device):  # so that tensors that a mod makes are where the query is
        mods = pair(arguments.mod, arguments.mask)
        documents, within = (_read_ids(name, getattr(arguments, name), device) for name in ("documents", "within"))
    if mods.block_mask is not None:
        mods = mods._replace(block_mask=mods.block_mask.to(device))
    dtype = getattr(torch, arguments.dtype or "float32")
    sizes = _sizes(arguments, mods, documents, within)
    _check_backend(arguments.backend, dtype, arguments.head_dim, device)
    causal = Causal(within, arguments.offset or 0) if arguments.causal else None
    case = Case(mods, sizes, dtype, device, arguments.backend, documents, causal)
    named = ", ".join(f"{name}={n}" for name, n in sizes._asdict().items())
    output.line(f"{mods.text}: {named}, {arguments.dtype or 'float32'}, {device}")
    done: list[Outcome] = []
    for check in CHECKS:
        if not check.why_not(case):
            output.progress(f"{check.name}: {check.sentence}")
        started = time.perf_counter()
        for outcome in check.outcomes(case, done):
            timed = outcome._replace(seconds=time.perf_counter() - started)
            started = time.perf_counter()
            done.append(timed)
            _tell(timed, output, arguments.debug)
    counts = {word: sum(o.outcome == word for o in done) for word in ("passed", "failed", "not run")}
    output.line(", ".join(f"{n} {word}" for word, n in counts.items()))
    output.document(
        {
            "subject": mods.text,
            "sizes": sizes,
            "dtype": arguments.dtype or "float32",
            "device": device,
            "backend": arguments.backend,
            "passed": counts["passed"],
            "failed": counts["failed"],
            "not_run": counts["not run"],
            "checks": [o._asdict() | {"error": None if o.error is None else told(o.error)} for o in done],
        }
    )
    return DIFFERS if counts["failed"] else FINE


def _tell(done: Outcome, output: Output, debug: bool) -> None:
    time_taken = "" if done.outcome == "not run" else f" ({done.seconds:.1f} s)"
    output.line(f"{done.outcome:<7}  {done.name}: {done.sentence}{time_taken}")
    if done.why:
        output.line(f"         {done.why}")
    if done.error is not None:
        for line in told(done.error).splitlines():
            output.line(f"         {line}".rstrip())
        if debug:
            traceback.print_exception(done.error)


def _read_ids(name: str, given: Any, device: str) -> Tensor | None:
    """[S] or [B, S] integer ids on a device, of lengths or of what a notation names; None if the option was not given."""
    import torch

    from flexattn.documents import Documents

    from .build import value

    if given is None:
        return None
    if isinstance(given, list):
        return Documents.from_lengths(given).document_ids.to(device)
    found = value(given)
    if isinstance(found, Documents):
        return found.document_ids.to(device)
    with reading(f"--{name} {given.text}"):
        ids = torch.as_tensor(found)
        if ids.dim() not in (1, 2) or ids.is_floating_point() or ids.dtype is torch.bool:
            raise Mistake(
                f"--{name} {given.text}: a {ids.dtype} of shape {list(ids.shape)}; ids are integers, [S] or [B, S], or name "
                "a flexattn.Documents, or write lengths: 60,40,60"
            )
    return ids.to(device)


def _sizes(arguments: argparse.Namespace, mods: Pair, documents: Tensor | None, within: Tensor | None) -> Sizes:
    """The problem: as said, else of what the mods and the ids are made for, else that of `Sizes`."""
    from flexattn.testing import Sizes

    from .build import read_sizes

    usual = Sizes()
    known = read_sizes(mods.score_mod, mods.mask_mod)
    if mods.block_mask is not None:
        B, H = mods.block_mask.sizes
        known |= dict(zip(("q_idx", "kv_idx"), mods.block_mask.seq_lengths, strict=True))
        known |= {name: n for name, n in (("b", B), ("h", H)) if n > 1}
    offset = arguments.offset or 0
    for ids, first in ((within, offset), (documents, 0)):
        if ids is not None:
            known |= {"q_idx": max(1, ids.shape[-1] - first), "kv_idx": ids.shape[-1]}
            known |= {"b": ids.shape[0]} if ids.dim() == 2 else {}
    said = chosen(arguments)
    if said is not None:
        for name, n in (("q_idx", said.Q_LEN), ("kv_idx", said.KV_LEN)):
            if documents is not None and n != documents.shape[-1]:
                raise Mistake(
                    f"--documents has {documents.shape[-1]} tokens, the shape {n} queries or keys; leave the shape out"
                )
            known[name] = n
        known |= {name: n for name, n in (("b", said.B), ("h", said.H)) if n is not None}
    length = known.get("q_idx", known.get("kv_idx", usual.L))
    heads = known.get("h", usual.Hq)
    kv_heads = arguments.kv_heads or (heads // 2 if heads % 2 == 0 else heads)
    dim = arguments.head_dim
    sizes = Sizes(
        known.get("b", usual.B), heads, kv_heads, known.get("q_idx", length), known.get("kv_idx", length), dim, dim
    )
    try:
        sizes.check()
    except ValueError as error:
        raise Mistake(f"--kv-heads {kv_heads}: {error}") from error
    places = max(sizes.L + offset, sizes.S)
    if within is not None and (within.shape[-1] < places or (within.dim() == 2 and len(within) != sizes.B)):
        raise Mistake(
            f"--within has ids {list(within.shape)}, and there are {sizes.B} batch entries of {places} positions; give an id "
            "for each, [S], or [B, S]"
        )
    return sizes


def _check_backend(backend: str, dtype: Any, head_dim: int, device: str) -> None:
    """Raise for the fused kernels where there are none."""
    import torch

    from flexattn import validate

    if backend == "triton":
        sample = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
        refusal = validate.triton_refusal(sample, sample)
        if refusal:
            raise Unavailable(f"--backend triton: the fused kernel {refusal}")


COMMAND = Command(
    "check",
    "test a mod: laws, reference, gradients, leaks, causality",
    "Run every test there is for a mod or a mask. Exit code 1 if one fails.",
    "flexattn check my/mods.py:alibi --mask causal_mask --causal",
    add,
    run,
)
